"""Laws of the task "image-classification", on a tiny random vision transformer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.errors import raises

from fedlora.errors import DataError, ModelError
from fedlora.tasks import Examples, Table
from fedlora.tasks.image_classification import ImageClassification, read_picture

COLUMNS = {"image": "image", "label": "label"}
GREY = np.random.default_rng(0).integers(0, 256, (6, 10, 12), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def model_folder(folder: Path, channels: int, **processor: Any) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=channels, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    facts = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.3] * channels,
        "image_std": [0.2] * channels,
        **processor,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("grey"), 1)


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("colour"), 3, image_std=[0.1, 0.2, 0.3])


def prepared(folder: Path, pictures: list[Any], labels: list[Any] | None = None) -> Examples:
    rows = LABELS[: len(pictures)] if labels is None else labels
    return ImageClassification().prepare(Table({"image": pictures, "label": rows}), folder, COLUMNS, keep=())


def pixels(examples: Examples) -> np.ndarray:
    return ImageClassification().collate(examples, range(len(examples)))["pixel_values"].numpy()


def model_of(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder).eval()


def test_the_model_gets_what_its_own_processor_makes(grey: Path, colour: Path) -> None:
    from transformers import AutoImageProcessor

    for folder, channels in ((grey, 1), (colour, 3)):
        pictures = [np.repeat(picture[:, :, None], channels, axis=2) for picture in GREY]
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        whole = processor(pictures, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        examples = prepared(folder, pictures)
        np.testing.assert_allclose(pixels(examples), whole, atol=1e-6)
        assert examples.inputs["pixel_values"].values.dtype == np.uint8


def test_a_processor_that_does_more_is_taken_at_its_word(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    # Rescales to -1 ... 1 and then standardises: no scale and shift of one formula.
    folder = model_folder(
        tmp_path, 3, image_processor_type="EfficientNetImageProcessor", rescale_offset=True, include_top=True
    )
    pictures = [np.repeat(picture[:, :, None], 3, axis=2) for picture in GREY]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    whole = processor(pictures, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels(prepared(folder, pictures)), whole, atol=1e-6)


def test_every_way_to_give_a_picture_is_the_same_picture(grey: Path, tmp_path: Path) -> None:
    picture = GREY[0]
    Image.fromarray(picture).save(tmp_path / "one.png")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    ways = [
        picture,
        picture.tolist(),
        picture[:, :, None],
        picture[None],
        np.repeat(picture[:, :, None], 3, axis=2),
        picture / 255,
        (picture / np.float32(255)).astype(np.float32),
        picture.astype(np.int64),
        Image.fromarray(picture),
        str(tmp_path / "one.png"),
        tmp_path / "one.png",
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": str(tmp_path / "one.png")},
    ]
    found = pixels(prepared(grey, ways, [0, 1] + [0] * (len(ways) - 2)))
    for way in found:
        np.testing.assert_array_equal(way, found[0])
    assert np.ptp(found[0]) > 1


def test_grey_pictures_become_colour_where_the_model_wants_it(colour: Path) -> None:
    examples = prepared(colour, [GREY[0], np.repeat(GREY[0][:, :, None], 3, axis=2)])
    found = pixels(examples)
    assert found.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(found[0], found[1])


def test_the_loss_is_the_models_own_and_batch_mates_do_not_change_it(grey: Path) -> None:
    task, model, examples = ImageClassification(), model_of(grey), prepared(grey, list(GREY))
    with torch.no_grad():
        alone = torch.cat([task.losses(model, task.collate(examples, [row])) for row in range(6)])
        together = task.losses(model, task.collate(examples, [4, 0, 5, 1, 2, 3]))
        batch = task.collate(examples, range(6))
        whole = model(**batch).loss
    torch.testing.assert_close(together, alone[[4, 0, 5, 1, 2, 3]], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.mean(), whole, atol=1e-5, rtol=0)
    assert alone.unique().numel() == 6


def test_measures_add_up(grey: Path) -> None:
    task, model, examples = ImageClassification(), model_of(grey), prepared(grey, list(GREY))
    with torch.no_grad():
        batch = task.collate(examples, range(6))
        measures = {name: value.numpy() for name, value in task.measure(model, batch).items()}
        guesses = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    found = task.summarise(measures)
    assert found["accuracy"] == pytest.approx(np.mean(guesses.numpy() == np.array(LABELS)))
    assert found["loss"] == pytest.approx(float(measures["loss"].mean()))


def test_taking_examples_takes_their_pictures(grey: Path) -> None:
    examples = prepared(grey, list(GREY))
    np.testing.assert_array_equal(pixels(examples.take([5, 2])), pixels(examples)[[5, 2]])
    np.testing.assert_array_equal(examples.inputs["pixel_values"][3], pixels(examples)[3])
    assert examples.lengths.tolist() == [5] * 6  # four patches and the class token


def test_noise_is_for_the_asked_rows_alone_grows_with_its_rate_and_keeps_the_source(grey: Path) -> None:
    task, examples = ImageClassification(), prepared(grey, [np.full((8, 8), 127, np.uint8)] * 6)
    before = examples.inputs["pixel_values"].values.copy()
    spread = []
    for rate in (0.0, 0.1, 0.3):
        noisy = task.corrupt(examples, np.array([1, 4]), rate, seed=0).inputs["pixel_values"].values
        np.testing.assert_array_equal(noisy[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
        spread.append(float(np.std(noisy[[1, 4]] / 255.0)))
    np.testing.assert_array_equal(examples.inputs["pixel_values"].values, before)
    assert spread[0] == 0
    assert spread[1] == pytest.approx(0.1, rel=0.2)
    assert spread[1] < spread[2]


@pytest.mark.parametrize(
    ("value", "code", "named"),
    [
        (np.full((4, 4), 256), "pixel-out-of-range", "256"),
        (np.full((4, 4), -0.1), "pixel-out-of-range", "-0.1"),
        (np.full((4, 4), np.nan), "pixel-out-of-range", "nan"),
        (np.zeros((5, 4, 5)), "bad-picture-shape", "[5, 4, 5]"),
        (np.zeros(4), "not-a-picture", ""),
        ([[1, 2], [3]], "not-a-picture", ""),
        (None, "not-a-picture", ""),
        ({"bytes": None, "path": None}, "empty-picture", ""),
        ("absent.png", "picture-not-readable", "'absent.png'"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(value: Any, code: str, named: str) -> None:
    with raises(DataError, code, named) as error:
        read_picture(value, 7, "photo", 1)
    assert str(error.value).startswith("row 7, column 'photo'")


def test_pictures_of_several_sizes_need_a_processor_that_resizes(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, 1, do_resize=False)
    with raises(DataError, "picture-sizes-differ", "column 'image'"):
        prepared(folder, [np.zeros((8, 8), np.uint8), np.zeros((9, 8), np.uint8)])


def test_a_folder_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with raises(ModelError, "no-image-processor", tmp_path, "preprocessor_config.json"):
        prepared(tmp_path, list(GREY))
