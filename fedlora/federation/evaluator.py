"""Measures the global model: on the server's test set, at the clients on what they keep apart, or on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, final

import numpy as np

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback, Evaluation
from fedlora.config import RunConfig
from fedlora.errors import ReplyError
from fedlora.fairness import fairness
from fedlora.federation.client_pool import (
    SHARED,
    ClientEvaluation,
    ClientInfo,
    ClientPool,
    Failure,
    RoundRequest,
    ServerPart,
    Sums,
)
from fedlora.federation.evaluation_sample import sample_size, stratified
from fedlora.model.base_history import show
from fedlora.progress import SAMPLED
from fedlora.rng import derive
from fedlora.tasks import Examples, Task
from fedlora.training.evaluate import Measures, domains_of, measure_batches, measures_of, summarised
from fedlora.training.kept_evaluation import kept_measures
from fedlora.training.workspace import Workspace

LARGEST_SUM = 1e300
"""Those of a federation's clients add up to a finite number."""


@final
class Evaluator:
    """Evaluates states as `[evaluation]` and `[selection]` say.

    Args:
        pool: Of the clients.
        config: Of the run.
        workspace: The server's.
        personal: Whether clients keep parts of their models.
        callbacks: Told of each evaluation on the server's test set, and of clients that report nothing.
    """

    def __init__(
        self, pool: ClientPool, config: RunConfig, workspace: Workspace, personal: bool, callbacks: Callback
    ) -> None:
        self._pool, self._config, self._workspace, self._callbacks = pool, config, workspace, callbacks
        self._personal = personal
        self._said: dict[int, str] = {}

    def show(self, state: GlobalState, digests: Mapping[int, str]) -> None:
        """Write a state's model to the server's own base.

        Args:
            state: Any of the run.
            digests: Of the base by version, as this run has made them.
        """
        show(self._workspace.base, state, digests)

    def measure(
        self,
        request: RoundRequest,
        clients: Mapping[int, ClientInfo],
        in_full: Callable[[Mapping[str, Any]], bool],
    ) -> dict[str, Any]:
        """Figures of a state.

        Args:
            request: With the state; no clients.
            clients: Those that can be asked.
            in_full: Whether all test examples of the server are measured, or the sample; is given "validation".

        Returns:
            For a line of metrics: the figures ("accuracy", "loss", ...) and "domains" of the server's test set, with
            "sample" (its size) if only that was measured, or the figures over all clients where they alone evaluate;
            "classes" (name -> its figures), if all examples were measured and the task has classes;
            "federated", where clients evaluate: "figures" over all their examples, "clients" (number -> its main
            figure, "loss" and "examples"), "macro" (the mean over clients), "worst_tenth" (the mean over the worst
            tenth of them), "left_out" (number -> why), "bytes_up" and "bytes_down"; where clients keep parts of their
            models these are the figures of each client's own model, and "shared" has "figures", "clients", "macro" and
            "worst_tenth" of the state's; "validation": the figures by which rounds are compared.
        """
        state, digests = request.state, request.digests
        how, selecting, data = self._config.evaluation, self._config.selection is not None, self._workspace.data
        line: dict[str, Any] = {}
        if how.at_server:
            self.show(state, digests)
            validation: dict[str, Any] = {}
            if data.validation is not None:
                validation["validation"] = self._measured(state, digests, "validation", data.validation).overall
            rows = None if in_full(validation) else self.sample
            result = self._measured(state, digests, "test", data.require_test(), rows)
            self._callbacks.evaluated(state, result)
            line |= {**result.overall, "domains": dict(result.domains), **validation}
            line |= self._by_class(result.sums) if rows is None else {"sample": len(rows)}
        if how.at_clients:
            parts: tuple[str, ...] = ("test", "validation") if how.on == "clients" and selecting else ("test",)
            parts += (f"test{SHARED}",) if self._personal else ()
            asked = replace(request, clients=self._sampled(state.round, clients))
            found = [self._checked(one) for one in self._pool.evaluate(asked, parts)]
            line["federated"] = self._federated(found)
            if how.on == "clients":
                sums = [one.sums["test"] for one in found if "test" in one.sums]
                classes = self._by_class(added(sums)) if sums else {}
                line |= {**line["federated"]["figures"], "domains": {}, **classes}
                if selecting:
                    line["validation"] = self._pooled(found, "validation")
        return line

    def _measured(
        self,
        state: GlobalState,
        digests: Mapping[int, str],
        part: ServerPart,
        examples: Examples,
        rows: np.ndarray | None = None,
    ) -> Evaluation:
        base, task, data = self._workspace.base, self._workspace.task, self._workspace.data
        domains = domains_of(examples, data.domain_column if part == "test" else None)
        processes = self._pool.measuring

        def batches_measured(batches: Sequence[np.ndarray]) -> Sequence[Measures]:
            if processes is None:
                return measure_batches(base, task, examples, batches)
            return processes.measure(RoundRequest(state.round, (), state, dict(digests)), part, batches)

        def measured() -> Measures:
            return measures_of(base, task, examples, indices=rows, run_batches=batches_measured)

        if state.round == 0 and part == "test":
            threads = self._workspace.machine.threads if processes is None else processes.threads
            measures = kept_measures(self._workspace, state, digests[state.base_version], threads, measured)
        else:
            measures = measured()
        return summarised(task, measures, domains, rows)

    def announce(self, rounds: range) -> None:
        """Say which rounds are measured on a sample.

        Args:
            rounds: That are neither done nor the last.
        """
        every = self._config.evaluation.every
        if self.sample is not None and any(number % every == 0 for number in rounds):
            size, of = len(self.sample), len(self._workspace.data.require_test())
            self._callbacks.message(
                f"rounds marked {SAMPLED} are measured on {size} of the {of} test examples (evaluation.sample); "
                "the first, the last and the kept one on all"
            )

    @cached_property
    def sample(self) -> np.ndarray | None:
        """Positions of the test examples that are measured between the first and the last round; None: all."""
        test = self._workspace.data.test
        if test is None or not self._config.evaluation.at_server:
            return None
        size = sample_size(self._workspace)
        return (
            None if size >= len(test) else stratified(test, self._workspace.data.domain_column, size, self._config.seed)
        )

    def _sampled(self, number: int, clients: Mapping[int, ClientInfo]) -> list[int]:
        share = self._config.evaluation.clients_fraction
        wanted = max(1, round(share * len(clients)))
        generator = np.random.default_rng(derive(self._config.seed, "evaluate", number))
        return sorted(int(k) for k in generator.choice(sorted(clients), size=wanted, replace=False))

    def _checked(self, one: ClientEvaluation) -> ClientEvaluation:
        """A client's evaluation, if it can be one of examples."""
        try:
            for sums in one.sums.values():
                _require_sums(sums, self._config.server.max_examples, self._workspace.task)
        except ReplyError as error:
            return replace(one, sums={}, failure=Failure("refused", str(error)))
        return one

    def _by_class(self, sums: Sums) -> dict[str, Any]:
        found = self._workspace.task.by_class(sums, self._workspace.data.label_names)
        return {"classes": found} if found else {}

    def _pooled(self, found: Sequence[ClientEvaluation], part: str) -> dict[str, float]:
        sums = [one.sums[part] for one in found if part in one.sums]
        return dict(self._workspace.task.figures(added(sums))) if sums else {}

    def _federated(self, found: Sequence[ClientEvaluation]) -> dict[str, Any]:
        left_out: dict[str, str] = {}
        for one in found:
            if "test" not in one.sums:
                why = one.failure.why if one.failure is not None else "it reports nothing of its test examples"
                left_out[str(one.client_id)] = why
                if self._said.get(one.client_id) != why:
                    self._said[one.client_id] = why
                    self._callbacks.message(f"client {one.client_id} is left out of the evaluation: {why}")
        shared = {"shared": self._by_client(found, f"test{SHARED}")} if self._personal else {}
        return {
            **self._by_client(found, "test"),
            **shared,
            "left_out": left_out,
            "bytes_up": sum(one.bytes_up for one in found),
            "bytes_down": sum(one.bytes_down for one in found),
        }

    def _by_client(self, found: Sequence[ClientEvaluation], part: str) -> dict[str, Any]:
        """Figures of a part over all clients, of each, and how they are spread."""
        task = self._workspace.task
        clients: dict[str, dict[str, float]] = {}
        for one in found:
            if part in one.sums:
                figures = task.figures(one.sums[part])
                clients[str(one.client_id)] = {
                    "examples": float(one.sums[part]["examples"]),
                    **{name: figures[name] for name in dict.fromkeys((task.metric, "loss"))},
                }
        line: dict[str, Any] = {"figures": self._pooled(found, part), "clients": clients}
        if clients:
            spread = fairness([row[task.metric] for row in clients.values()], higher_is_better=task.higher_is_better)
            line |= {"macro": {task.metric: spread.mean}, "worst_tenth": {task.metric: spread.worst_decile}}
        return line


def _require_sums(sums: Sums, most_examples: int, task: Task) -> None:
    """Raise `ReplyError` for what no examples give."""
    examples = float(sums["examples"])
    if not (examples.is_integer() and 1 <= examples <= most_examples):
        raise ReplyError(
            f"it says to have evaluated {examples:g} examples, and that is no whole number from 1 to "
            f"server.max_examples = {most_examples}",
            code="invalid-weight",
        )
    for name, values in sums.items():
        negative = name not in task.signed_sums and bool((np.asarray(values) < 0).any())
        if negative or not bool((np.abs(values) <= LARGEST_SUM).all()):
            raise ReplyError(f"its sum {name!r} is negative, not finite or above {LARGEST_SUM:g}", code="invalid-sums")
    with np.errstate(all="ignore"):
        task.require_sums(sums)
        try:
            found = task.figures(sums)[task.metric]
        except ArithmeticError as error:
            raise ReplyError(f"its sums give no figures: {error}", code="invalid-sums") from error
    if not math.isfinite(found):  # other figures may be NaN, as a correlation is where nothing varies
        raise ReplyError(f"its sums give a {task.metric} of {found:g}", code="invalid-sums")


def added(sums: Sequence[Sums]) -> dict[str, np.ndarray]:
    """Statistics of several sets of examples as one, in float64.

    Args:
        sums: At least one, of one task; in the order in which they are added.
    """
    return {name: np.asarray(np.sum([one[name] for one in sums], axis=0, dtype=np.float64)) for name in sums[0]}
