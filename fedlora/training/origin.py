"""What a run says of itself in the model card of its export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config import NODES, RunConfig
from fedlora.model.model_card import Origin
from fedlora.passed_in import adapter_name, last_part, shown
from fedlora.privacy.disclosure import OF_NOISED_UPDATES, RECORD

NO_CLAIM = "None: updates were aggregated as they were sent, without noise, and nothing is claimed."
UNFINISHED = "The run has not come to its end, and makes no statement on its privacy yet."


def origin_of(config: RunConfig, record: Mapping[str, Any], privacy: str | None, start: str | None = None) -> Origin:
    """Facts, figures and claim of the model after a round.

    Args:
        config: Of the run.
        record: The round's line of metrics.
        privacy: The run's statement; None: it has none (yet).
        start: Hash of the adapter that the run began with, as in provenance.json; None: it is not known.
    """
    data = config.data
    source = "each site's own, which stayed there" if data.source == NODES else last_part(shown(data.source))
    figures = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name not in RECORD | OF_NOISED_UPDATES and not name.startswith("seconds")
    }
    fields = ", ".join(f"{key} = {value}" for key, value in config.strategy.fields.items())
    adapter, began = config.adapter, dict[str, str]()
    if adapter.start is not None:
        began["Started from"] = f"the adapter {adapter_name(adapter.start)}" + (f" ({start[:16]})" if start else "")
    return Origin(
        {
            "Task": config.task.name,
            "Training data": source,
            "Partition": config.partition.name,
            "Aggregation rule": config.strategy.name + (f" ({fields})" if fields else ""),
            "Rounds": str(record.get("round", 0)),
            "Local training": config.train.loop or f"{config.train.optimizer}, learning rate {config.train.lr:g}",
            "Adapter": f"{adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}",
            "Base model": last_part(shown(config.model.name))
            + (f" at {config.model.revision}" if config.model.revision else ""),
            "Seed": str(config.seed),
        }
        | began,
        figures,
        privacy or (NO_CLAIM if config.privacy is None else UNFINISHED),
    )
