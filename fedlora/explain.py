"""Every key of a config: its type, default and meaning, for `fedlora config`, and as a JSON schema for editors.

Both come from pydantic's schema of the models. The meaning of a key is the string under its field; that of a rule's,
partition's or task's field is its line in the class's "Args:".
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from fedlora.config import OPEN_TABLES, RunConfig, Section
from fedlora.errors import ConfigError, nearest
from fedlora.registry import OWN_CLASS, Registry

REQUIRED = "(must be given)"
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
ENTRY_DOC = "Which one; the other keys of the table are its fields."

Schema = Mapping[str, Any]


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
    schema = json_schema()
    return list(_keys_of(schema, "", schema))


def find_keys(path: str) -> list[Key]:
    """The key of that path, all keys of a table, or a key of an open table for each entry that has it.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    known = keys()
    found = [key for key in known if key.path == path or key.path.startswith(path + ".")]
    if not found:
        raise ConfigError(f"there is no key {path!r}; {nearest(path, {key.path for key in known})}", code="unknown-key")
    return found


def json_schema() -> dict[str, Any]:
    """A JSON schema of whole config files, with the entries that the open tables can name."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    for cls in _subclasses(Section):
        described = schema if cls is RunConfig else definitions.get(cls.__name__)
        for field, doc in attribute_docs(cls).items() if described else ():
            described["properties"][field]["description"] = doc
    definitions.pop("OpenTable")
    for table in OPEN_TABLES:
        default = RunConfig.model_fields[table].default
        branches = [
            _branch(name, cls, definitions, default.fields if name == default.name else None)
            for name, cls in entries(table).items()
        ]
        own = {"name": {"type": "string", "pattern": OWN_CLASS}}
        branches.append({"type": "object", "title": "one of your own", "properties": own, "required": ["name"]})
        schema["properties"][table] = {"anyOf": branches, "default": {"name": default.name}}
    return {"$schema": SCHEMA_DIALECT, **_in_one_line(schema), "title": "A fedlora run"}


def entries(table: str) -> Mapping[str, type]:
    """The classes that an open table can name, by name."""
    from fedlora.aggregators import rules
    from fedlora.partition import partitioners
    from fedlora.tasks import tasks

    registries: dict[str, Registry[Any]] = {"strategy": rules, "partition": partitioners, "task": tasks}
    return dict(registries[table].items())


def attribute_docs(cls: type) -> dict[str, str]:
    """Field -> the string under it, in the class or a base class.

    pydantic's `use_attribute_docstrings` would read the same when a class is made, and so whenever a process starts: it
    took a quarter of what importing the config takes.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Section):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, doc in pairwise(tree.body):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = inspect.cleandoc(text)
    return found


def _subclasses(cls: type[Section]) -> Iterator[type[Section]]:
    for inner in cls.__subclasses__():
        yield inner
        yield from _subclasses(inner)


def args_docs(cls: type) -> dict[str, str]:
    """Field -> its line in the "Args:" of the class or of a base class."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE)
        body = textwrap.dedent(section[1]) if section else ""
        for names, words in re.findall(r"^(\w+(?:, \w+)*): (.*(?:\n[ \t]+.*)*)", body, re.MULTILINE):
            text = " ".join(words.split())
            found |= dict.fromkeys(names.split(", "), text[:1].upper() + text[1:])
    return found


def _branch(name: str, cls: Any, definitions: dict[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """The open table's schema for one entry; definitions that it refers to are moved to the whole schema's.

    Args:
        name: the entry's name.
        cls: its class, a dataclass.
        definitions: of the whole schema.
        defaults: if this entry is the table's default, the values of its fields that the default sets.
    """
    schema = TypeAdapter(cls).json_schema()
    definitions.update(schema.pop("$defs", {}))
    docs = args_docs(cls)
    fields = {field.name: schema["properties"][field.name] for field in dataclasses.fields(cls) if field.init}
    for field, described in fields.items():
        described |= {"description": docs[field]} if field in docs else {}
        described |= {"default": defaults[field]} if defaults and field in defaults else {}
    required = [field for field in fields if field in schema.get("required", ())]
    return {
        "type": "object",
        "title": name,
        "description": inspect.cleandoc(cls.__doc__ or ""),
        "properties": {"name": {"const": name}, **fields},
        "required": ["name", *required] if defaults is None else [],
        "additionalProperties": False,
    }


def _in_one_line(tree: Any) -> Any:
    """A schema in which each description is its first paragraph, in one line."""
    if isinstance(tree, list):
        return [_in_one_line(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: " ".join(value.partition("\n\n")[0].split())
        if key == "description" and isinstance(value, str)
        else _in_one_line(value)
        for key, value in tree.items()
    }


# ---------------------------------------------------------------------------------------------- the schema as keys


def _keys_of(table: Schema, prefix: str, whole: Schema) -> Iterator[Key]:
    """The keys of a table, then those of the tables in it."""
    nested: list[Iterator[Key]] = []
    for name, field in table["properties"].items():
        path, doc, inner = prefix + name, field.get("description", ""), _tables_in(field, whole)
        if len(inner) > 1:
            nested.append(_keys_of_several(inner, path, field.get("default"), whole))
        elif inner:
            if field.get("type") == "array":
                yield Key(path, "array of tables", "none", doc)
            nested.append(_keys_of(inner[0], f"{path}.", whole))
        else:
            default = REQUIRED if name in table.get("required", ()) else say(field.get("default"))
            yield Key(path, kind_of(field, whole), default, doc)
    for several in nested:
        yield from several


def _keys_of_several(
    tables: Sequence[Schema], path: str, default: Mapping[str, Any] | None, whole: Schema
) -> Iterator[Key]:
    """Of tables to choose from by their key "name" or "unit"; what both units have in common once."""
    chooser = "unit" if path == "privacy" else "name"
    choices = {table["properties"][chooser].get("const"): table for table in tables}
    own = choices.pop(None, None)
    names = ", ".join(choices) + (', or "module:Class"' if own else "")
    doc = tables[0]["properties"][chooser].get("description", ENTRY_DOC)
    yield Key(f"{path}.{chooser}", f"one of: {names}", say((default or {chooser: next(iter(choices))})[chooser]), doc)
    found = {
        name: [key for key in _keys_of(table, f"{path}.", whole) if key.path != f"{path}.{chooser}"]
        for name, table in choices.items()
    }
    first, *others = found.values()
    common = [key for key in first if all(key in other for other in others)] if chooser == "unit" else []
    yield from common
    for name, several in found.items():
        yield from (dataclasses.replace(key, entry=name) for key in several if key not in common)


def _tables_in(schema: Schema, whole: Schema) -> list[Schema]:
    """The tables that a field can hold: one, several to choose from, or none."""
    if "$ref" in schema:
        return _tables_in(whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "properties" in schema:
        return [schema]
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), schema.get("items") or {}]
    return [table for part in parts if part for table in _tables_in(part, whole)]


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
