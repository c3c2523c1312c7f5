"""What all tables share: their base class, and types of their fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many, json_schema_input_type=str | tuple[str, ...])]
Counts = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=PositiveInt | tuple[PositiveInt, ...]),
    Field(min_length=1),
]


class Section(BaseModel):
    """Base of all tables: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


OPEN_TABLES = ("strategy", "partition", "task")


class OpenTable(BaseModel):
    """A table whose `name` chooses an entry of a registry; the other keys are that entry's fields."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def fields(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})
