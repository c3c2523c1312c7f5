"""What a site's audit log says of a message and of its answer: kinds, sizes and norms, and no value of any tensor."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedlora.config import RunConfig
from fedlora.errors import FedloraError, PrivacyError
from fedlora.flower import client_app
from fedlora.flower.messages import decode_head, decode_request, decode_request_head, payload_bytes
from fedlora.flower.update_checks import RECORDS, require_buffer
from fedlora.privacy.ledger import Ledger
from fedlora.sanitize import clean_text

MAX_TEXT = 200
"""Characters of a text that the coordinator chose."""


def of_request(message: Message, context: Context) -> dict[str, Any]:
    """What can be said of a message before anything of it is believed.

    Args:
        message: Of any content.
        context: With the text of the run's config, whose hash it is that `fedlora node approve` takes.
    """
    facts: dict[str, Any] = {
        "flower_run": str(context.run_id),
        "type": clean_text(message.metadata.message_type, MAX_TEXT),
        "config": hashlib.sha256(str(context.run_config.get("toml", "")).encode()).hexdigest(),
        "bytes": payload_bytes(message.content),
    }
    try:
        head = json.loads(str(message.content.config_records["plan"]["json"]))
        said = {key: head[key] for key in ("run", "round", "client_id", "kept_round", "parts") if key in head}
    except (KeyError, TypeError, ValueError, RecursionError):
        return facts
    return {
        **facts,
        **{key: value if type(value) is int else clean_text(value, MAX_TEXT) for key, value in said.items()},
    }


def of_run(config: RunConfig) -> dict[str, Any]:
    """What a run is, by its config."""
    privacy = config.privacy
    return {
        "name": clean_text(config.name, MAX_TEXT),
        "model": clean_text(config.model.name, MAX_TEXT),
        "rule": clean_text(config.strategy.name, MAX_TEXT),
        "private": "no" if privacy is None else privacy.unit,
    }


def of_answer(request: RecordDict, content: RecordDict) -> dict[str, Any]:
    """What an answer holds: its bytes, the figures and texts in it, and the L2 norm of what was trained.

    Args:
        request: What was asked.
        content: Of the answer.
    """
    facts: dict[str, Any] = {"bytes": payload_bytes(content), "records": sorted(content)}
    try:
        head = decode_head(content)
        facts["kind"] = str(head["kind"])
        facts["said"] = {key: clean_text(v, MAX_TEXT) for key, v in head.items() if key not in ("protocol", "kind")}
    except (FedloraError, KeyError):
        facts["kind"] = "records of another strategy"
    figures = {name: value for record in content.metric_records.values() for name, value in record.items()}
    if figures:
        facts["figures"] = {name: _number(value) for name, value in figures.items()}
    if (norm := _norm_of_change(request, content)) is not None:
        facts["norm_of_change"] = norm
    return facts


def of_ledger(path: str, seen: str, config: RunConfig | None) -> dict[str, Any]:
    """The head of a ledger, and the epsilon that all runs together have spent in it; {} for a run that spends none.

    Args:
        path: Of the ledger; "" where the site has none.
        seen: Its head in the log so far: of a ledger that does not go on from there no head is written down.
        config: Of the run, at whose delta and by whose accountant epsilon is stated; None: it cannot be read.
    """
    privacy = None if config is None else config.example_privacy
    if not path or privacy is None:
        return {}
    ledger = Ledger(path)
    try:
        ledger.require_head(seen)
        spent = ledger.epsilon(privacy.delta, privacy.accountant)
        return {"ledger": ledger.head(), "epsilon": _number(spent), "delta": privacy.delta}
    except PrivacyError as error:
        return {"ledger_not_usable": clean_text(error)}


def _norm_of_change(request: RecordDict, content: RecordDict) -> float | None:
    """L2 norm over all tensors of an update of what it adds to where training started, as the server decodes it."""
    if {name: type(record) for name, record in content.items()} != RECORDS:
        return None
    try:
        asked = decode_request(request, decode_request_head(request), client_app.held_parts)
        if asked is None:
            return None
        sent = asked.decode(require_buffer(content, RECORDS))
    except (FedloraError, KeyError, TypeError, ValueError):
        return None
    squares = sum(float((t.double() - asked.starts[name].double()).square().sum()) for name, t in sent.items())
    return _number(math.sqrt(squares))


def _number(value: Any) -> Any:
    """A number as JSON has it: other readers do not know NaN and infinities."""
    return value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else clean_text(value)
