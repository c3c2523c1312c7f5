"""How good the model is: where that is measured, how often, and which round's model is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlora.config._base import Fraction, PositiveInt, Section


class EvaluationConfig(Section):
    """Where and how often the global model is measured, always before training and after the last round too."""

    on: Literal["server", "clients", "both", "off"] = "server"
    """On the "server"'s test set; on the "clients", each of which keeps `data.test_fraction` of its own examples apart
    (whole groups of `data.group`) and sends sums, so that the figures are those of all these examples in one place; on
    "both"; or "off". With "clients" and "off" the server needs no test data."""
    every: PositiveInt = 1
    """Evaluate after each so many rounds."""
    sample: Literal["auto"] | Fraction | Annotated[int, Field(gt=1)] = "auto"
    """How many of the server's test examples are measured between the first and the last round: a number, or a share
    (1.0: all), drawn once by the seed with the same shares of domains and classes. "auto": a quarter of the examples
    that a round trains on, which cost about a tenth of the round, and at least 256. All are measured before training,
    after the last round, and after each round that is the best so far (`[selection]`)."""
    metric: str | None = None
    """One more figure, "my_module:my_metric": a function of `measures` (arrays of the examples, for a value of each, of
    which the mean counts) or of `sums` (statistics that add up over examples, for the figure itself)."""
    clients_fraction: Fraction = 1.0
    """Share of the clients that are asked to evaluate."""
    min_examples: PositiveInt = 10
    """A client that keeps fewer examples apart reports nothing: figures of a few examples would tell of each."""

    @property
    def at_server(self) -> bool:
        """Whether the server measures, on a test set of its own."""
        return self.on in ("server", "both")

    @property
    def at_clients(self) -> bool:
        """Whether clients measure, on what they keep apart."""
        return self.on in ("clients", "both")


class SelectionConfig(Section):
    """Which round's model is kept: the best by a validation part of the data, which is neither trained on nor part of
    the test. It lies with the clients where `evaluation.on` is "clients", else with the server."""

    metric: str | None = None
    """Figure by which rounds are compared. None: the task's main one."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more or less of it is better; "auto" knows it for the task's own figures."""
    keep: Literal["best", "last"] = "best"
    """Whether the "best" round's model becomes `adapter/` (the last is kept beside it), or the "last"."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a better one. None: never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much a figure must be better to count as better."""
