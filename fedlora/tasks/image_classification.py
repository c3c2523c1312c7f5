"""The task "image-classification": one class for each picture.

Shapes: n = examples, b = examples in a batch, c = channels, h = height and w = width as the model wants them,
k = classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor, nn

from fedlora.assets import Checkpoint, cached_per_checkpoint
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.provenance import config_digest
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Table, tasks
from fedlora.tasks._classification import Classification, Weights

SLICE = 256  # pictures that are resized at once
PATCH_AREA = 256  # pixels that cost about a token where a model has no patches


@dataclass(frozen=True, eq=False)
class Pixels(Sequence[np.ndarray]):
    """Pictures of one size; item i is picture i as the model wants it, float32 [c, h, w]: values * scale + shift.

    Args:
        values: eight bits each [n, c, h, w], a quarter of the memory of what the model gets; or float32.
        scale: [c], float32.
        shift: [c], float32.
    """

    values: np.ndarray
    scale: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Pixels: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Pixels:
        if isinstance(index, slice):
            return replace(self, values=self.values[index])
        return self.ready([index])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> Pixels:
        """The pictures at `indices`, in that order."""
        return replace(self, values=self.values[np.asarray(indices, dtype=np.int64)])

    def ready(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some pictures as the model wants them, float32 [b, c, h, w]."""
        chosen = self.values[np.asarray(indices, dtype=np.int64)].astype(np.float32)
        return chosen * self.scale[:, None, None] + self.shift[:, None, None]


@tasks.register("image-classification")
@dataclass(frozen=True)
class ImageClassification(Classification):
    """One class for each picture.

    A picture is a file's path, a PIL image, or an array [h, w], [h, w, c] or [c, h, w], also as nested lists: whole
    numbers go from 0 to 255, other numbers from 0 to 1. The model folder's own image processor resizes and normalises.

    Args:
        labels: names of the classes in the order of their numbers. Empty: the source's own names where it has them,
            else the labels found, sorted. A node that reads its own file needs them, since it may lack a class. A
            checkpoint whose head was trained for these very classes keeps its own order of them.
        class_weights: name of a class -> what the loss of its examples is multiplied with in training; 1 for those that
            are not named. The loss stays a mean over examples, where torch's with `weight` is divided by the weights.
            Evaluation has none.
        label_smoothing: share of the training target that is spread evenly over all classes (Szegedy et al. 2016, arXiv
            1512.00567, section 7); evaluation has none.
    """

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    roles: ClassVar[tuple[str, ...]] = ("image", "label")

    labels: tuple[str, ...] = ()
    class_weights: Weights = field(default_factory=dict)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def head(self) -> tuple[str, ...]:
        """Names that transformers gives to the classification head."""
        return ("classifier",)

    def reads(self, model: str | Path | Checkpoint) -> dict[str, str]:
        """The image processor's hash."""
        return {"processor": config_digest(_processor(model)[0].to_dict())}

    def prepare(
        self, table: Table, model_path: str | Path | Checkpoint, columns: Mapping[str, str], *, keep: Sequence[str]
    ) -> Examples:
        """Resize a table's pictures for the model.

        Raises:
            DataError: a picture or a label is missing or not usable; the message names the row (from 0) and the column.
            ModelError: the model folder has no image processor.
        """
        names, labels = self.classes(table, columns["label"], model_path)
        processor, channels, patch = _processor(model_path)
        pixels = _process(processor, table.columns[columns["image"]], columns["image"], channels)
        _, _, height, width = pixels.values.shape
        cost = (height // patch) * (width // patch) + 1 if patch else max(1, height * width // PATCH_AREA)
        return Examples(
            inputs={"pixel_values": pixels},
            labels=labels,
            lengths=np.full(len(labels), cost, dtype=np.int64),
            columns={name: np.asarray(table.columns[name]) for name in keep},
            label_names=names,
        )

    def collate(self, examples: Examples, indices: Sequence[int] | np.ndarray) -> Batch:
        """ "pixel_values" [b, c, h, w] and "labels" [b]."""
        assert examples.labels is not None
        rows = np.asarray(indices, dtype=np.int64)
        return {
            "pixel_values": torch.from_numpy(_pixels(examples).ready(rows)),
            "labels": torch.from_numpy(examples.labels[rows]),
        }

    def corrupt(self, examples: Examples, rows: np.ndarray, rate: float, seed: int) -> Examples:
        """Noise in the pictures: normal, of standard deviation `rate` where black is 0 and white is 1, then clipped."""
        pixels = _pixels(examples)
        if pixels.values.dtype != np.uint8:
            raise ConfigError(
                "noise cannot be added to what this model's image processor returns: remove partition.feature_noise",
                code="no-feature-noise",
            )
        values = pixels.values.copy()
        noise = np.random.default_rng(seed).normal(scale=255 * rate, size=values[rows].shape)
        values[rows] = np.clip(np.rint(values[rows] + noise), 0, 255).astype(np.uint8)
        return replace(examples, inputs={**examples.inputs, "pixel_values": replace(pixels, values=values)})

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b k"]:
        """The classification head's scores."""
        scores: Tensor = model(pixel_values=batch["pixel_values"].to(next(model.parameters()).dtype)).logits
        return scores


def _pixels(examples: Examples) -> Pixels:
    pixels = examples.inputs["pixel_values"]
    assert isinstance(pixels, Pixels)
    return pixels


@cached_per_checkpoint
def _processor(checkpoint: Checkpoint) -> tuple[Any, int, int]:
    """The image processor of a checkpoint, the model's channels, and its patch size (0 without)."""
    from transformers import AutoConfig, AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint.source, backend="pil", **checkpoint.options)
        config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
    except MemoryError:
        raise
    except Exception as error:  # from files of others
        raise ModelError(
            f"{str(checkpoint)!r} has no image processor (preprocessor_config.json) that can be loaded: "
            f"{checkpoint.why_not_loaded(error)}; choose an image model as model.name, or change task.name",
            code="no-image-processor",
        ) from error
    patch = getattr(config, "patch_size", 0)
    return processor, int(getattr(config, "num_channels", 3)), patch if isinstance(patch, int) else 0


def _process(processor: Any, pictures: Sequence[Any], column: str, channels: int) -> Pixels:
    def run(start: int, end: int, **options: bool) -> np.ndarray:
        given = [read_picture(pictures[row], row, column, channels) for row in range(start, end)]
        try:
            found = processor(given, input_data_format="channels_last", return_tensors="np", **options)["pixel_values"]
            return np.asarray(found)
        except (ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError) as error:
            if end - start > 1:  # find the one that is refused
                return np.concatenate([run(row, row + 1, **options) for row in range(start, end)])
            raise DataError(
                f"row {start}, column {column!r}: the model's image processor refuses the image: "
                f"{_first_line(error)}; remove or convert it",
                code="picture-refused",
            ) from None

    # Resized only, pictures stay at eight bits; the rest is a scale and a shift, if this processor does no more.
    plain = {"do_rescale": False, "do_normalize": False}
    scale, shift = _normalisation(processor, channels)
    first = Pixels(run(0, 1, **plain), scale, shift)
    if first.values.dtype != np.uint8 or not np.allclose(first[0], run(0, 1)[0], atol=1e-5):
        plain, scale, shift = {}, np.ones(channels, np.float32), np.zeros(channels, np.float32)
    try:
        parts = [run(at, min(at + SLICE, len(pictures)), **plain) for at in range(0, len(pictures), SLICE)]
        return Pixels(np.concatenate(parts), scale, shift)
    except ValueError:
        raise DataError(
            f"column {column!r}: the images still differ in size after the model's image processor: use images of one "
            "size, or a processor that resizes",
            code="picture-sizes-differ",
        ) from None


def _normalisation(processor: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(x * factor - mean) / std as x * scale + shift."""
    factor = float(getattr(processor, "rescale_factor", 1 / 255)) if getattr(processor, "do_rescale", True) else 1.0
    mean, std = np.zeros(channels), np.ones(channels)
    if getattr(processor, "do_normalize", True):
        mean, std = (np.broadcast_to(getattr(processor, key), (channels,)) for key in ("image_mean", "image_std"))
    return (factor / std).astype(np.float32), (-mean / std).astype(np.float32)


def read_picture(value: Any, row: int, column: str, channels: int) -> np.ndarray:
    """One picture at eight bits, uint8 [h, w, c].

    Args:
        value: a path, a PIL image, an array, nested lists, or a mapping with "bytes" or "path" as the hub stores
            pictures.
        row: for messages.
        column: for messages.
        channels: 1 for grey, 3 for colour, whatever the picture has.

    Raises:
        DataError: it is no picture.
    """
    where = f"row {row}, column {column!r}"
    if isinstance(value, Mapping) and not (value.get("bytes") or value.get("path")):
        raise DataError(f"{where}: the image has neither bytes nor a path: remove the row", code="empty-picture")
    if isinstance(value, str | Path | Mapping | Image.Image):
        picture = _opened(value, where)
    else:
        picture = Image.fromarray(_eight_bits(value, where))
    if channels not in (1, 3):
        raise ModelError(
            f"the model expects images of {channels} channels, only 1 and 3 are supported: choose another model.name",
            code="channels-not-supported",
        )
    if picture.mode in DEEP_MODES:
        picture = Image.fromarray(_from_deep(np.asarray(picture), where))
    found = np.asarray(picture.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return found.reshape(*found.shape[:2], channels)


DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of more than eight bits a pixel, all grey. Its own conversion clips them at 255, so that a picture
of 16 bits (X-rays, depth) turns white."""


def _opened(value: str | Path | Mapping[str, Any] | Image.Image, where: str) -> Image.Image:
    """A stored picture as `datasets` gives it: turned as its EXIF orientation says, the first frame of an animation.

    Raises:
        DataError: it cannot be read.
    """
    name = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str | Path) else None
    try:
        if isinstance(value, Image.Image):
            value.load()
            return ImageOps.exif_transpose(value)
        content: Any = value
        if isinstance(value, Mapping):
            content = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
        with Image.open(content) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise whatever they stumble over
        named = "" if name is None else f" {clean_text(repr(str(name)), 200)}"
        raise DataError(
            f"{where}: the image{named} cannot be read: {_first_line(error)}; check the path and the file",
            code="picture-not-readable",
        ) from None


def _from_deep(array: np.ndarray, where: str) -> np.ndarray:
    """Grey values of 16 bits, or real numbers from 0 to 1, as uint8 [h, w]."""
    if array.dtype.kind == "f":
        return _eight_bits(array, where)
    if array.min() < 0 or array.max() > 65535:
        raise DataError(
            f"{where}: the values range from {array.min()} to {array.max()}, which 16 bits cannot hold (0 to 65535): "
            "convert it to 8 or 16 bits",
            code="pixel-out-of-range",
        )
    return np.rint(array / 257).astype(np.uint8)


def _first_line(error: Exception) -> str:
    return clean_text(next(iter(str(error).splitlines()), "") or type(error).__name__, 150)


def _eight_bits(value: Any, where: str) -> np.ndarray:
    """An array or nested lists as uint8 [h, w] or [h, w, 3 or 4]."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or array.size == 0:
        raise DataError(
            f"{where}: give a path, an image, or an array of shape [height, width] or [height, width, channels]",
            code="not-a-picture",
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise DataError(
            f"{where}: an array of shape {list(array.shape)} does not have 1, 3 or 4 channels: convert it",
            code="bad-picture-shape",
        )
    if array.dtype.kind == "b":
        array = array.astype(np.float32)
    top = 1 if array.dtype.kind == "f" else 255
    if not (array.min() >= 0 and array.max() <= top):  # so that NaN is refused too
        raise DataError(
            f"{where}: values range from {array.min()} to {array.max()}: scale them to 0 to 255 (integers) or 0 to 1",
            code="pixel-out-of-range",
        )
    array = np.rint(array * 255).astype(np.uint8) if top == 1 else array.astype(np.uint8)
    return np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
