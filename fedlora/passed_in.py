"""Models and data that a caller passes in as objects: written once to the cache folder, and read from there by path.

What a copy is called follows from its content, so that the same object is written once and found again; every process,
resume and command reads it as it would read any other folder or file.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from fedlora.config import ClientsConfig, RunConfig
from fedlora.errors import ConfigError, DataError, FedloraError, ModelError, looks_like_path
from fedlora.files import cache_dir, write_atomically
from fedlora.hashing import digest_of, file_digest, tensors_digest
from fedlora.provenance import config_digest

if TYPE_CHECKING:
    import datasets

FOLDER = "passed-in"
COPY = re.compile(r"(model|data)-[0-9a-f]{32}(\.parquet)?")
CLIENT = "client"
"""Name of the column that says whose an example is, where a caller passes in each client's own."""
KINDS = "a datasets.Dataset, a pandas.DataFrame or a list of dicts"


def is_copy(name: str) -> bool:
    """Whether a name in a config is the path of a copy of what a caller passed in."""
    path = Path(name)
    return path.parent.name == FOLDER and COPY.fullmatch(path.name) is not None


def shown(name: str) -> str:
    """What a person is told of a model's or a data set's name."""
    return f"passed in by the caller ({Path(name).stem})" if is_copy(name) else name


def last_part(name: str) -> str:
    """A name, or of a path the last part, for what may be handed on: it is not about one's folders."""
    is_path = looks_like_path(name) or Path(name).is_absolute() or Path(name).exists()
    return PureWindowsPath(name).name or name if is_path else name


def adapter_name(folder: str) -> str:
    """The same of an adapter's folder, which is called by its run where it is a run's."""
    path = Path(folder)
    return f"{path.parent.name}/{path.name}" if path.name == "adapter" else path.name


def copies_in(*names: str | None) -> list[str]:
    """What of a config's names are copies, by their own names."""
    return [Path(name).stem for name in names if name is not None and is_copy(name)]


def refuse_lost(name: str, error: type[FedloraError], keyword: str) -> None:
    """Raise where a copy is not there, which nothing but the object can bring back.

    Args:
        name: In a config.
        error: To raise.
        keyword: Under which the object was passed in.
    """
    if is_copy(name) and not Path(name).exists():
        raise error(
            f"{name!r} is the copy of what the caller passed in, and is gone: pass {keyword} again",
            code="copy-lost",
        )


def keep_model(model: Any, reader: Any = None) -> Path:
    """The folder with a copy of a model.

    Args:
        model: A `transformers.PreTrainedModel`, which is left as it is.
        reader: Its tokenizer, image processor or processor.

    Raises:
        ConfigError: One of the two is something else.
        ModelError: Its class would not load it again as it is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model= is a {type(model).__name__}: pass a transformers model, or a table such as "
            'model={"name": ...} (of a PEFT model its merge_and_unload())',
            code="bad-object",
        )
    if reader is not None and not hasattr(reader, "save_pretrained"):
        raise ConfigError(
            f"tokenizer= is a {type(reader).__name__}: pass a tokenizer, image processor or processor of transformers",
            code="bad-object",
        )
    state = model.state_dict()
    _require_loadable(model, state)
    parts = [type(model).__name__, tensors_digest(state), config_digest(model.config.to_dict())]
    if (generation := getattr(model, "generation_config", None)) is not None:
        parts.append(config_digest(generation.to_dict()))
    with tempfile.TemporaryDirectory(prefix=".model-", dir=_folder()) as work:
        new = Path(work) / "model"
        new.mkdir()
        if reader is not None:
            reader.save_pretrained(new)
        parts += [f"{path.name} {file_digest(path)}" for path in sorted(new.rglob("*")) if path.is_file()]
        copy = _folder() / f"model-{digest_of(parts)}"
        if not copy.is_dir():
            before = dict(vars(model.config))  # where saving writes the class's name
            model.save_pretrained(new)
            vars(model.config).clear()
            vars(model.config).update(before)
            new.rename(copy)
    return copy


def keep_data(data: Any, keyword: str, *, secret: bool = False) -> Path:
    """The file with a copy of examples; classes that a data set has as numbers are written by their names.

    Args:
        data: A `datasets.Dataset`, a `pandas.DataFrame` (whose index is left out) or a list of dicts.
        keyword: Under which it was passed in, for messages.
        secret: Whether the name, which stands in the run's config, must not tell of the examples: it is then a hash
            under a key that stays in the cache folder.

    Raises:
        ConfigError: It is something else.
        DataError: It is empty, or a column mixes types.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets.table import embed_table_storage

    try:
        found = _by_names(_dataset(data, keyword))
        table = embed_table_storage(found.with_format("arrow")[:]).replace_schema_metadata(None)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{keyword} cannot be written as a table: {first}; give each column one type", code="mixed-types"
        ) from None
    if len(table) == 0:
        raise DataError(f"{keyword} has no rows: pass some", code="empty-file")
    with tempfile.TemporaryDirectory(prefix=".data-", dir=_folder()) as work:
        new = Path(work) / "data.parquet"
        pyarrow.parquet.write_table(table, new)
        digest = hashlib.blake2b(new.read_bytes(), digest_size=16, key=_key() if secret else b"")
        copy = _folder() / f"data-{digest.hexdigest()}.parquet"
        if not copy.is_file():
            new.rename(copy)
    return copy


def keep_clients(clients: Mapping[str, Any] | Sequence[Any], *, secret: bool = False) -> Path:
    """The file with a copy of the examples of all clients, whose column `CLIENT` says whose each is.

    Args:
        clients: Name -> examples as `keep_data` takes them; or these in the order of the clients, whose names are then
            their numbers.
        secret: See `keep_data`.

    Raises:
        ConfigError: It is something else, or there is such a column already.
        DataError: See `keep_data`; or the columns of two clients differ in type.
    """
    if not isinstance(clients, Mapping):
        if not isinstance(clients, list | tuple):
            raise ConfigError(
                f"clients= is a {type(clients).__name__}: pass a mapping of names to data, or a list of data",
                code="bad-object",
            )
        width = len(str(len(clients) - 1))  # in the order of the names is in the order of the numbers
        clients = {f"{number:0{width}}": data for number, data in enumerate(clients)}
    parts = {str(name): _by_names(_dataset(data, f"clients[{name!r}]")) for name, data in clients.items()}
    for name, part in parts.items():
        if len(part) == 0:
            raise DataError(f"clients[{name!r}] has no rows: leave the client out", code="client-without-examples")
        if CLIENT in part.column_names:
            raise ConfigError(
                f"clients[{name!r}] has a column {CLIENT!r}, which clients= makes: rename it, or pass all rows as "
                f'dataset= with partition={{"name": "natural", "column": {CLIENT!r}}}',
                code="column-taken",
            )
    if not parts:
        raise ConfigError("clients= is empty: pass the data of at least one client", code="bad-object")
    import datasets

    try:
        whole = datasets.concatenate_datasets(
            [part.add_column(CLIENT, [name] * len(part)) for name, part in parts.items()]
        )
    except ValueError as error:  # of columns that differ in type
        first = next(iter(str(error).splitlines()), "")
        raise DataError(f"the columns of clients= do not go together: {first}", code="mixed-types") from None
    return keep_data(whole, "clients=", secret=secret)


def split_objects(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of `fedlora.run`: keys of a config, and objects ("model", "tokenizer", "dataset", "clients")
    by these names."""
    plain, objects = dict(changes), {}
    for key in ("tokenizer", "dataset"):
        if (value := plain.pop(key, None)) is not None:
            objects[key] = value
    model = plain.get("model")
    if model is not None and not isinstance(model, Mapping):
        objects["model"] = plain.pop("model")
    elif model and not isinstance(model.get("name", ""), str | Path):
        objects["model"] = model["name"]
        plain["model"] = {key: value for key, value in model.items() if key != "name"}
    clients = plain.get("clients")
    if clients is not None and not (
        isinstance(clients, Mapping) and clients.keys() <= ClientsConfig.model_fields.keys()
    ):
        objects["clients"] = plain.pop("clients")
    table = plain.get("data", {})
    if not isinstance(table, Mapping | str):
        raise ConfigError(
            f"data= is a {type(table).__name__}: it takes the keys of [data] as a dict; pass examples as dataset=",
            code="bad-object",
        )
    named = table.keys() & {"source", "test"} if isinstance(table, Mapping) else frozenset()
    if named & {{"train": "source"}.get(part, part) for part in _parts(objects)} or (
        "clients" in objects and ("train" in _parts(objects) or "partition" in plain or "source" in named)
    ):
        raise ConfigError(
            "dataset= and clients= stand for data.source, data.test and the partition: leave out what is given twice "
            '(test data beside clients= are dataset={"test": ...})',
            code="given-twice",
        )
    return plain, objects


def with_objects(config: RunConfig, objects: Mapping[str, Any]) -> RunConfig:
    """A config that names the copies of what was passed in, see `fedlora.run`.

    Args:
        config: Without them.
        objects: From `split_objects`.

    Raises:
        FedloraError: One of them is not of a kind that can be passed in.
    """
    tree, secret = config.model_dump(), config.privacy is not None
    if "model" in objects or "tokenizer" in objects:
        tree["model"]["name"] = str(kept_model(objects))
    for part, rows in _parts(objects).items():
        key = {"train": "source"}.get(part, part)
        named = isinstance(rows, str | Path)
        tree["data"][key] = str(rows if named else keep_data(rows, f"dataset[{part!r}]", secret=secret))
    if "clients" in objects:
        tree["data"]["source"] = str(keep_clients(objects["clients"], secret=secret))
        tree["partition"] = {"name": "natural", "column": CLIENT}
        if config.data.domain is None and tree["data"]["test"] is None:  # so that the test has a share of each client
            tree["data"]["domain"] = CLIENT
    return RunConfig.model_validate(tree)


def kept_model(objects: Mapping[str, Any]) -> Path:
    """The copy of the model among some objects; `ConfigError` where there is its tokenizer alone."""
    if "model" not in objects:
        raise ConfigError("tokenizer= belongs to a model that is passed in: give model= too", code="tokenizer-alone")
    if isinstance(objects["model"], str | Path):
        return Path(objects["model"])
    return keep_model(objects["model"], objects.get("tokenizer"))


def names_of_classes(objects: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The names of the classes of the training data's column, in the order of their numbers, where the data say it."""
    clients = objects.get("clients")
    first = next(iter(clients.values() if isinstance(clients, Mapping) else clients or ()), None)
    return _class_names(_parts(objects).get("train", first), column)


def _parts(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Of a data set: "train", "test" or both."""
    dataset = objects.get("dataset")
    if not isinstance(dataset, Mapping):
        return {} if dataset is None else {"train": dataset}
    if odd := sorted(dataset.keys() - {"train", "test"}):
        raise ConfigError(f"dataset= has a part {odd[0]!r}: its parts are 'train' and 'test'", code="unknown-key")
    return dict(dataset)


def _class_names(data: Any, column: str) -> tuple[str, ...]:
    feature = getattr(data, "features", {}).get(column)
    return tuple(getattr(feature, "names", None) or ())


def _dataset(data: Any, keyword: str) -> datasets.Dataset:
    import datasets
    import pandas

    if isinstance(data, datasets.Dataset):
        return data.with_format(None)
    if isinstance(data, pandas.DataFrame):
        known = data.astype(object).where(data.notna(), None)
        return datasets.Dataset.from_dict({str(name): known[name].tolist() for name in data.columns})
    if isinstance(data, list | tuple) and all(isinstance(row, Mapping) for row in data):
        names = dict.fromkeys(name for row in data for name in row)
        return datasets.Dataset.from_dict({name: [row.get(name) for row in data] for name in names})
    raise ConfigError(f"{keyword} is a {type(data).__name__}: pass {KINDS}", code="bad-object")


def _by_names(data: datasets.Dataset) -> datasets.Dataset:
    for column in list(data.column_names):
        if names := _class_names(data, column):
            values = [None if k is None or k < 0 else names[k] for k in data[column]]
            data = data.remove_columns(column).add_column(column, values)
    return data


def _require_loadable(model: Any, state: Mapping[str, Any]) -> None:
    """Refuse what would be another model when its class loads it by its config."""
    import copy

    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "model= has an adapter in it: merge it first (merge_and_unload), or load the model anew",
            code="model-not-loadable",
        )
    if any(value.is_meta for value in state.values()):
        raise ModelError(
            "model= is not in memory (meta tensors): load it without offloading", code="model-not-loadable"
        )
    if not type(model).__module__.startswith(("transformers.", "transformers_modules.")):
        raise ModelError(
            f"model= is a {type(model).__name__}, which transformers cannot load by its config: pass a model of one of "
            "transformers' own classes",
            code="model-not-loadable",
        )
    if getattr(model, "is_quantized", False):
        return
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config)).state_dict()
    mine, anew = ({name: tuple(value.shape) for name, value in held.items()} for held in (state, fresh))
    if odd := sorted(name for name in mine.keys() | anew.keys() if mine.get(name) != anew.get(name)):
        raise ModelError(
            f"model= is not what {type(model).__name__} makes of its config ({odd[0]!r} differs), so that it could not "
            "be loaded again: change its config instead of its modules",
            code="model-not-loadable",
        )


def _folder() -> Path:
    folder = cache_dir() / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key() -> bytes:
    path = _folder() / "key"
    if not path.is_file():
        write_atomically(path, secrets.token_bytes(32))
        path.chmod(0o600)
    return path.read_bytes()
