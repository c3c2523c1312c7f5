"""Which replies are used: the checks of a reply's values, and what it weighs. The same wherever the client is.

In this order: every value is finite; the norm is below the cap; the weight is a whole number in [1, the declared
maximum] and all figures are ones that a client measures; the change is plausible beside what others sent before; a
private update states that it was made as was asked.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.aggregators import ClientUpdate, Fact
from fedlora.config import RunConfig
from fedlora.data.own import brought_by_nodes
from fedlora.errors import ReplyError
from fedlora.federation.client_pool import ClientReply
from fedlora.federation.example_level_account import check_stated
from fedlora.federation.last_result import LastResult, same_tensors
from fedlora.federation.plausibility import (
    COUNTED_LOSS,
    SMALLEST_LOSS,
    START_LOSS,
    UPDATE_NORM,
    Expectations,
    largest_change,
    largest_loss,
    largest_weight,
)
from fedlora.federation.protocol import TrainRequest
from fedlora.privacy.disclosure import REFUSED, Disclosure
from fedlora.sanitize import clean_text
from fedlora.training.dp_settings import private_settings
from fedlora.training.job import TrainJob, learning_rate, number_of_steps
from fedlora.training.workspace import Workspace

logger = logging.getLogger(__name__)

FIGURES = frozenset(("loss", "steps", "seconds", "compute_seconds", "examples_seen"))
"""What a client may report besides its number of examples, without [privacy]."""
LARGEST_FIGURES = {"steps": 1e9, "seconds": 1e8, "compute_seconds": 1e10, "examples_seen": 1e12}
"""What cannot be negative, and how large it may be; the loss of training may be any finite number."""
LARGEST_LOSS = 1e13
"""To the power of q-FedAvg's largest q, 20, and times a number of examples it is still a number."""


@final
class Screen:
    """The checks of a run.

    Args:
        config: Of the run.
        workspace: The server's; where the partition is its own it knows who has how many examples.
    """

    def __init__(self, config: RunConfig, workspace: Workspace) -> None:
        self._config, self._workspace = config, workspace
        self._own_data = brought_by_nodes(config)
        self._flat_starts = LastResult(lambda starts: _flat(starts.values()), same_tensors)
        self._allowed = FIGURES if config.privacy is None else Disclosure(config.privacy.unit).figures

    def admit(
        self,
        reply: ClientReply,
        request: TrainRequest,
        sent: Mapping[str, Tensor],
        figures: Mapping[str, object],
        expected: Expectations,
    ) -> ClientReply:
        """Check a reply.

        Args:
            reply: What is known of it so far.
            request: That it answers.
            sent: Its tensors, with names, shapes and dtypes as asked.
            figures: "num_examples" and what else the client reports.
            expected: What is known before the round.

        Returns:
            The reply, with the update that is used and what is written down of it.

        Raises:
            ReplyError: naming the first check that failed; under user-level privacy without the values.
        """
        try:
            change = self._require_sound(request, sent)
            claimed, metrics = self._require_figures(request, figures)
        except ReplyError as error:
            if self._config.client_privacy is None:
                raise
            logger.debug("client %d: %s", request.client_id, error)
            raise ReplyError(REFUSED, code="withheld") from None
        self._require_plausible(request, change, expected)
        if self._config.example_privacy is not None:
            check_stated(metrics, private_settings(self._config, request.client_id))
        weight = self._weight(request.client_id, claimed, expected)
        facts = self._facts(request, claimed, metrics, expected)
        update = ClientUpdate(
            request.client_id, request.updated(sent), weight, request.plan.base_version, metrics, facts
        )
        written = self._written_down(claimed, weight, metrics, change)
        if (most := largest_loss(expected.median_loss)) < written.get(START_LOSS, 0.0):
            written[COUNTED_LOSS] = most
        if reply.simulated_s is not None:
            written["simulated_seconds"] = reply.simulated_s
        return replace(reply, update=update, sends=request.plan.sends, figures=written)

    def _require_sound(self, request: TrainRequest, sent: Mapping[str, Tensor]) -> float:
        """The L2 norm of what the client changed."""
        change = l2_norm(sent.values(), self._flat_starts({name: request.starts[name] for name in sent}))
        if not math.isfinite(change):  # also for changes beyond float32, or whose squares are beyond float64
            for name, tensor in sent.items():
                if not torch.isfinite(tensor).all():
                    raise ReplyError(
                        f"tensor {name!r} holds values that are not finite: lower the client's learning rate",
                        code="not-finite",
                    )
        cap = self._config.server.max_norm
        if cap is not None and not (norm := l2_norm(sent.values())) <= cap:
            raise ReplyError(
                f"the update's norm {norm:.4g} is above server.max_norm = {cap:g}", code="norm-above-maximum"
            )
        return change

    def _require_figures(self, request: TrainRequest, figures: Mapping[str, object]) -> tuple[int, dict[str, float]]:
        """The number of examples that the client claims, and its figures."""
        most = self._most_examples(request.client_id)
        claimed = figures.get("num_examples")
        if not isinstance(claimed, int) or isinstance(claimed, bool):
            raise ReplyError(
                f"num_examples must be a whole number, not {clean_text(claimed, 40)!r}", code="invalid-weight"
            )
        if not 1 <= claimed <= most:
            raise ReplyError(
                f"num_examples {claimed} is not within 1 and {most}, the smaller of server.max_examples and what the "
                "partition gives it",
                code="invalid-weight",
            )
        if odd := set(figures) - self._allowed - {"num_examples"} - request.measured:
            raise ReplyError(f"metric {clean_text(min(odd), 40)!r} was not asked for", code="unexpected-metric")
        metrics: dict[str, float] = {}
        for name, value in figures.items():
            if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise ReplyError(f"metric {name!r} is no finite number", code="invalid-metric")
            if name in LARGEST_FIGURES and not 0 <= value <= LARGEST_FIGURES[name]:
                raise ReplyError(f"metric {name!r} is {value:g}, which no client measures", code="invalid-metric")
            if name == START_LOSS and not 0 <= value <= LARGEST_LOSS:
                raise ReplyError(
                    f"its loss before training ({START_LOSS}) is {value:g}, and {self._config.strategy.name!r} goes by "
                    f"losses that are not negative, up to {LARGEST_LOSS:g}: give the task such a loss, or choose "
                    "another rule",
                    code="invalid-metric",
                )
            metrics[name] = float(value)
        if missing := request.measured - metrics.keys():
            raise ReplyError(f"metric {min(missing)!r} was asked for, and is not there", code="metric-missing")
        return claimed, metrics

    def _most_examples(self, client_id: int) -> int:
        """What this client may claim."""
        config = self._config
        if config.privacy is not None and config.server.weighting == "uniform":
            return 1
        if config.privacy is not None or self._own_data:
            return config.server.max_examples
        return min(config.server.max_examples, max(1, len(self._workspace.data.clients[client_id])))

    def _facts(
        self, request: TrainRequest, claimed: int, metrics: Mapping[str, float], expected: Expectations
    ) -> dict[Fact, float]:
        """What the plan asks to know; a client is not believed where the server knows by itself."""
        config, plan, clients = self._config, request.plan, self._workspace.data.clients
        facts: dict[Fact, float] = {}
        if "clients" in plan.asks:
            facts["clients"] = float(len(clients))
        if "rates" in plan.asks:
            train = config.train_of(request.client_id)
            how = TrainJob(plan.adapter, plan.trains, np.empty(0), 0, round=request.round, rounds=config.rounds)
            if config.example_privacy is not None:
                steps = private_settings(config, request.client_id).schedule.steps
            else:
                steps = number_of_steps(claimed if self._own_data else len(clients[request.client_id]), train)
            facts["rates"] = sum(learning_rate(step, steps, train, how) for step in range(steps))
        if START_LOSS in plan.asks:
            facts[START_LOSS] = min(metrics[START_LOSS], largest_loss(expected.median_loss)) + SMALLEST_LOSS
        return facts

    def _require_plausible(self, request: TrainRequest, change: float, expected: Expectations) -> None:
        """Raise `ReplyError` for a change that is far too large beside the others' and what was sent."""
        ratio = self._config.server.max_norm_ratio
        if ratio == "off" or self._config.client_privacy is not None:
            return
        if not change <= largest_change(1.0, expected.median_change, ratio):  # nearly always that is enough
            start = l2_norm(request.plan.adapter.tensors().values())
            if not change <= (most := largest_change(start, expected.median_change, ratio)):
                raise ReplyError(
                    f"its change has norm {change:.4g}, far above the others': the most is {most:.4g} "
                    f"(server.max_norm_ratio = {ratio:g})",
                    code="implausible-change",
                )

    def _weight(self, client_id: int, claimed: int, expected: Expectations) -> float:
        """What a reply weighs in the mean."""
        if self._config.server.weighting != "examples":
            return 1.0
        ratio = self._config.server.max_weight_ratio
        if not self._own_data or ratio == "off":
            return float(claimed)
        return min(float(claimed), largest_weight(client_id, expected.claims, ratio))

    def _written_down(
        self, claimed: int, weight: float, metrics: Mapping[str, float], change: float
    ) -> dict[str, float]:
        # Under user-level privacy no figure of one client is written down, but for the weight, which counts as public.
        if self._config.client_privacy is not None:
            return {"num_examples": weight}
        figures = {"num_examples": claimed, **metrics}
        if self._config.privacy is None:
            if math.isfinite(change):
                figures[UPDATE_NORM] = change
            if self._own_data and weight < claimed and self._config.server.weighting == "examples":
                figures["weight"] = weight
        return figures


def l2_norm(tensors: Iterable[Tensor], less: Float[Tensor, "n"] | None = None) -> float:
    """The L2 norm over all entries of some tensors, summed in float64; infinite where float64 is too small.

    Args:
        tensors: On the CPU.
        less: What is first taken off, entry by entry in the tensors' order.
    """
    flat = _flat(tensors)
    norm = float(torch.linalg.vector_norm(flat if less is None else flat.sub_(less), dtype=torch.float64))
    return norm if math.isfinite(norm) else math.inf


def _flat(tensors: Iterable[Tensor]) -> Float[Tensor, "n"]:
    """A new vector of all entries."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors] or [torch.empty(0)])
