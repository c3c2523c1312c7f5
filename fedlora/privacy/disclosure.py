"""What a run with [privacy] may tell: the one list of what is written into its folder and of what leaves a client.

Under unit = "example" nobody is trusted: what leaves a client is noised tensors and functions of the config and of the
ledger. Under unit = "client" the server is trusted with the updates and nobody with the run's folder: what is in it is
made from noised means, the config, and who answered (with how many examples, where weights go by them).

Not on the list, because they depend on the data of clients: numbers and lengths of examples, seconds (how long
something took), losses and accuracies on training data, hashes of training data, and what an error has to say of it.
The list is checked where files are written (`fedlora.runs.rundir`) and where a client answers
(`fedlora.federation.client_training`); what is not on it is refused, not left out, so that nobody relies on it.
A simulation's `privacy/` folder holds the ledgers of its clients, and `clients/` what they keep from round to round
(under unit = "client" without noise): both belong to them and are no part of what is given away with the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from fedlora.errors import PrivacyError

WITHHELD: Final = "it failed: see its own log; the reason is withheld, because it may reveal its data"
"""All that a private client says of an error that came when its data had been looked at."""
REFUSED: Final = "its reply was refused; the reason may reveal its data, and is not recorded"
"""All that the folder of a run with unit = "client" says of a reply that failed a check of its values."""

FIGURES: Final[Mapping[str, frozenset[str]]] = {
    "example": frozenset(
        {"num_examples", "steps", "sample_rate", "noise_multiplier", "max_grad_norm", "attempts"}  # num_examples: 1
    ),
    "client": frozenset({"num_examples"}),  # 1 under uniform weights; otherwise it counts as public
}
"""Unit -> figures that go with an update; they are functions of the plan, of the config and of the ledger."""

HEADS: Final[Mapping[str, frozenset[str]]] = {
    "hello": frozenset({"client_id", "fedlora", "fingerprint", "rank", "ledger"}),
    "need": frozenset({"parts", "base"}),
    "spent": frozenset({"error"}),
    "error": frozenset({"error"}),
    "update": frozenset({"round", "base_digest", "layout", "ledger"}),
}
"""Kind of a reply -> keys of its head beside "protocol" and "kind". "ledger" is a hash over what a client was asked for
and random names, by which a ledger that was rolled back is known: it tells whether the client has spent since, and
nothing of any example."""

PROVENANCE: Final = frozenset({"base", "tokenizer", "chat_template", "processor", "class_names", "test_data", "start"})
"""Keys of provenance.json: no hash of training data. The starting adapter is in the run's first checkpoint anyway."""

FILES: Final = frozenset(
    {
        "config.toml",
        "config_changes.json",
        "environment.json",
        "nodes.json",
        "ledgers.json",
        "provenance.json",
        "run-id",
        "privacy",
        "metrics.jsonl",
        "checkpoints",
        "clients",  # of simulated clients, on whose own machines it would be
        "merges",
        "adapter",
        "adapter.unverified",
        "adapter-last",
        "outcomes.safetensors",
        "outcomes-waiting.safetensors",
        "samples.json",
        "result.json",
        "report.html",
        "accuracy.png",
        "tracking.json",
        "tensorboard",
        ".lock",
    }
)
"""Files and folders of a private run; nodes.json has the names and keys under which nodes are registered,
ledgers.json the hashes by which their ledgers are known."""

ENVIRONMENT: Final = frozenset(
    {
        "fedlora",
        "commit",
        "python",
        "packages",
        "platform",
        "processor",
        "instructions",
        "cores",
        "usable_cores",
        "threads",
        "cuda",
        "device",
        "omp_wait_policy",
        "keeps_memory",
        "deterministic",
        "seed",
        "passed_in",  # data by a hash under a key that stays in the cache folder
        "backend",
        "dtype",
        "kernels",
        "kernels_why",
        "kernels_measured",  # on random inputs
        "kernels_timings",
        "attention",
        "attention_why",
        "prefix_cache",
        "prefix_cache_why",
        "cohort",
        "cohort_why",
        "processes",
        "processes_why",
        "pass_cost",  # by the size of the model
        "padding_why",
        "new_weights",
        "resumed",
    }
)
"""Keys of environment.json. What is chosen automatically goes by the config, the machine and the test examples."""

RECORD: Final = frozenset(
    {
        "round",
        "train_loss",  # always null
        "bytes_up",
        "bytes_down",
        "asked",
        "answered",
        "refused",
        "missing",
        "clients",
        "lost",
        "offline",
        "dropped",
        "late",
        "simulated_seconds",
        "validation",
        "sample",  # by the config, the size of the test set and what `examples_to_tell` tells
        "rule",
        "turned_away",
        "spent",
        "epsilon",
        "domains",
        "classes",  # figures over the test examples, as those that stand beside them
    }
)
"""Keys of a line of metrics.jsonl, beside the figures over the test examples."""
OF_NOISED_UPDATES: Final = frozenset({"aggregation_error"})
"""More of them where each update is noised already."""


@final
@dataclass(frozen=True)
class Disclosure:
    """The list for one unit.

    Args:
        unit: "example" or "client".
    """

    unit: str

    @property
    def figures(self) -> frozenset[str]:
        """What may go with an update."""
        return FIGURES[self.unit]

    def require_reply(self, head: Mapping[str, Any], figures: Collection[str] = ()) -> None:
        """Raise `PrivacyError` for a client's reply that says more than it may.

        Args:
            head: of the reply.
            figures: names of what goes with the update.
        """
        kind = str(head.get("kind"))
        allowed = HEADS.get(kind, frozenset()) | {"protocol", "kind"}
        _require(head.keys(), allowed, f"a private client's {kind!r}")
        _require(figures, self.figures, "what goes with a private update")

    def require_json(self, name: str, value: object) -> None:
        """Raise `PrivacyError` for a JSON file that a private run may not write, or not with these keys.

        Args:
            name: of the file, in the run's folder.
            value: its content.
        """
        _require([name], FILES, "the folder of a private run")
        if isinstance(value, Mapping) and name == "environment.json":
            for facts in (value, *value.get("resumed", ())):
                _require(facts.keys() - {"round"}, ENVIRONMENT, name)
        if isinstance(value, Mapping) and name == "provenance.json":
            _require(value.keys(), PROVENANCE, name)

    def require_record(self, record: Mapping[str, Any], measured: Collection[str]) -> None:
        """Raise `PrivacyError` for a line of metrics that a private run may not write.

        Args:
            record: of one round.
            measured: names of the figures over the test examples, which are the server's own.
        """
        more = OF_NOISED_UPDATES if self.unit == "example" else frozenset()
        _require(record.keys(), RECORD | more | set(measured), "metrics.jsonl")
        for row in record.get("clients", {}).values():
            _require(row.keys(), self.figures | {"simulated_seconds"}, "metrics.jsonl, of a client")
        if record.get("train_loss") is not None:
            raise PrivacyError(
                "metrics.jsonl of a private run must not hold a training loss: report this bug", code="not-disclosable"
            )


def _require(names: Collection[str], allowed: Collection[str], where: str) -> None:
    if odd := set(names) - set(allowed):
        raise PrivacyError(
            f"{where}: {min(odd)!r} is not among the figures that a private run may disclose "
            "(fedlora.privacy.disclosure): report this bug",
            code="not-disclosable",
        )
