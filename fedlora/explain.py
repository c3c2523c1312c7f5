"""Every key of a config: its type, default and meaning, for `fedlora config`, and as a JSON schema for editors.

The words are those of the source: the string under a field, or its line in the class's "Args:". Nothing is said twice.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter

from fedlora.config import OPEN_TABLES, RunConfig, Section
from fedlora.errors import ConfigError, nearest

REQUIRED = "(must be given)"
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
OWN_RULE = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
"""Names such as "my_module:MyRule"."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config.

    Args:
        path: "train.lr"; keys of `[[clients.profiles]]` are "clients.profiles.rank".
        kind: its type in words, with the choices or bounds.
        default: as TOML would have it, or `REQUIRED`.
        doc: what it means; "" where the name says it.
        entry: for a field of an open table the table's `name` that it belongs to, and for one of [privacy] its `unit`;
            "" for keys that are always there.
    """

    path: str
    kind: str
    default: str
    doc: str = ""
    entry: str = ""

    @property
    def table(self) -> str:
        """The table that it stands in, "" for the top."""
        return self.path.rpartition(".")[0]

    @property
    def chooser(self) -> str:
        """The key whose value is `entry`."""
        return f"{self.table}.unit" if self.table == "privacy" else f"{self.table}.name"


def keys() -> list[Key]:
    """All keys in the order of the tables."""
    return list(_keys_of(RunConfig, "", RunConfig.model_json_schema()))


def find_keys(path: str) -> list[Key]:
    """The key of that path, all keys of a table, or a key of an open table for each entry that has it.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    known = keys()
    found = [key for key in known if key.path == path or key.path.startswith(path + ".")]
    if not found:
        raise ConfigError(f"there is no key {path!r}; {nearest(path, {key.path for key in known})}")
    return found


def json_schema() -> dict[str, Any]:
    """A JSON schema of whole config files, with the entries that the open tables can name."""
    schema = RunConfig.model_json_schema()
    for cls in _sections(RunConfig):
        described = schema if cls is RunConfig else schema["$defs"][cls.__name__]
        described["description"] = _first_paragraph(cls)
        for name, doc in field_docs(cls).items():
            described["properties"][name]["description"] = doc
    definitions = schema["$defs"]
    definitions.pop("OpenTable")
    for table in OPEN_TABLES:
        default = RunConfig.model_fields[table].default.name
        branches = [_branch(name, cls, definitions, name == default) for name, cls in entries(table).items()]
        if table == "strategy":
            own = {"name": {"type": "string", "pattern": OWN_RULE}}
            branches.append({"type": "object", "title": "a rule of your own", "properties": own, "required": ["name"]})
        schema["properties"][table] = {"anyOf": branches}
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "A fedlora run"}


def entries(table: str) -> Mapping[str, type]:
    """What an open table can name."""
    from fedlora.aggregators import rules
    from fedlora.partition import partitioners
    from fedlora.tasks import task_classes

    if table == "strategy":
        return rules()
    return task_classes() if table == "task" else {name: partitioners.get(name) for name in partitioners}


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """What the source says of a class's fields, inherited ones included; fields without words are left out."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(("builtins", "pydantic", "abc", "typing")):
            continue
        found.update(_args_section(inspect.cleandoc(base.__doc__ or "")))
        found.update(_strings_under_fields(base))
    return {name: doc[:1].upper() + doc[1:] for name, doc in found.items()}


# ---------------------------------------------------------------------------------------------- the source's words


def _strings_under_fields(cls: type) -> Iterator[tuple[str, str]]:
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # a class without a file, typed into a session
        return
    assert isinstance(node, ast.ClassDef)
    for here, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield here.target.id, " ".join(value.value.split())


def _args_section(doc: str) -> Iterator[tuple[str, str]]:
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    if section is None:
        return
    body = textwrap.dedent(section[1])
    for names, words in re.findall(r"^(\w+(?:, \w+)*): (.*(?:\n[ \t]+.*)*)", body, flags=re.MULTILINE):
        for name in names.split(", "):
            yield name, " ".join(words.split())


def _first_paragraph(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


# ---------------------------------------------------------------------------------------------- types in words


def _sections(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield cls
    for field in cls.model_fields.values():
        for inner in _sections_in(field.annotation):
            yield from _sections(inner)


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The tables that a field can hold: one, several to choose from, or none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections_in(part)]


def _keys_of(cls: type[BaseModel], prefix: str, schema: Mapping[str, Any]) -> Iterator[Key]:
    docs = field_docs(cls)
    here = schema if cls is RunConfig else schema["$defs"][cls.__name__]
    nested: list[Iterator[Key]] = []
    for name, field in cls.model_fields.items():
        path = prefix + name
        inner = _sections_in(field.annotation)
        if name in OPEN_TABLES and cls is RunConfig:
            nested.append(_keys_of_open(name, field.default))
        elif len(inner) > 1:
            nested.append(_keys_of_several(inner, f"{path}.", schema))
        elif inner and name != "profiles":
            nested.append(_keys_of(inner[0], f"{path}.", schema))
        elif inner:
            yield Key(path, "array of tables", "none", docs.get(name, ""))
            nested.append(_keys_of(inner[0], f"{path}.", schema))
        else:
            default = REQUIRED if field.is_required() else say(field.get_default())
            yield Key(path, kind_of(here["properties"][name], schema), default, docs.get(name, ""))
    for several in nested:
        yield from several


def _keys_of_several(classes: Sequence[type[Section]], prefix: str, schema: Mapping[str, Any]) -> Iterator[Key]:
    """Of tables to choose from by their key "unit": what all have alike once, the rest for each."""
    units = [get_args(cls.model_fields["unit"].annotation)[0] for cls in classes]
    several = [(unit, list(_keys_of(cls, prefix, schema))) for unit, cls in zip(units, classes, strict=True)]
    yield Key(f"{prefix}unit", f"one of: {', '.join(units)}", say(units[0]), field_docs(classes[0]).get("unit", ""))
    common = [key for key in several[0][1] if all(key in found for _, found in several)]
    yield from common
    for unit, found in several:
        yield from (
            dataclasses.replace(key, entry=unit) for key in found if key not in common and key.path != f"{prefix}unit"
        )


def _keys_of_open(table: str, default: Any) -> Iterator[Key]:
    found = entries(table)
    more = ', or "module:Class"' if table == "strategy" else ""
    kind = "one of: " + ", ".join(found) + more
    yield Key(f"{table}.name", kind, say(default.name), "Which one; the other keys of the table are its fields.")
    for name, cls in found.items():
        schema = TypeAdapter(cls).json_schema()
        docs = field_docs(cls)
        for field in _init_fields(cls):
            usual = REQUIRED if field.default is dataclasses.MISSING else say(field.default)
            if default.name == name and field.name in default.fields:
                usual = say(default.fields[field.name])
            kind = kind_of(schema["properties"][field.name], schema)
            yield Key(f"{table}.{field.name}", kind, usual, docs.get(field.name, ""), name)


def _init_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _branch(name: str, cls: Any, definitions: dict[str, Any], is_default: bool) -> dict[str, Any]:
    """The open table's schema for one entry; definitions that it refers to are moved to the whole schema's."""
    schema = TypeAdapter(cls).json_schema()
    definitions.update(schema.pop("$defs", {}))
    docs = field_docs(cls)
    fields = {}
    for field in _init_fields(cls):
        fields[field.name] = schema["properties"][field.name]
        if field.name in docs:
            fields[field.name]["description"] = docs[field.name]
    required = [field.name for field in _init_fields(cls) if field.default is dataclasses.MISSING]
    return {
        "type": "object",
        "title": name,
        "description": _first_paragraph(cls),
        "properties": {"name": {"const": name}, **fields},
        "required": [] if is_default else ["name", *required],
        "additionalProperties": False,
    }


def kind_of(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in schema:
        return kind_of(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        kinds = [kind_of(part, whole) for part in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "enum" in schema or "const" in schema:
        return "one of: " + ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = str(schema.get("type", "anything"))
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    if kind == "array":
        inner = schema.get("items") or {}
        return f"list of ({kind_of(inner, whole)})" if inner else "list"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"table of ({kind_of(inner, whole)})" if isinstance(inner, Mapping) else "table"
    return kind + (f", {' and '.join(bounds)}" if bounds else "")


def say(value: object) -> str:
    """A value as TOML would have it; "none" for a key that is left out."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {say(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(say(inner) for inner in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
