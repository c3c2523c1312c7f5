"""What a client measured <-> a Flower message: sums of fixed shapes in one buffer, under a digest of their layout.

A request is that of a round of training (`fedlora.flower.messages`) with `parts` in its head, and asks for no tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedlora.errors import ReplyError
from fedlora.federation.client_pool import Sums
from fedlora.federation.protocol import TrainRequest, note_head
from fedlora.flower.arrays import to_array
from fedlora.flower.messages import BUFFER, decode_head
from fedlora.flower.update_checks import require_buffer, require_layout, require_same_round
from fedlora.sanitize import clean_text
from fedlora.wire_formats import Header, from_raw, header_of, joined, layout_digest, raw_bytes, sliced

RECORDS = {"reply": ConfigRecord, "sums": ArrayRecord}
"""What the reply of a client that has evaluated holds."""


def layout_of(like: Sums, parts: Sequence[str]) -> dict[str, Header]:
    """Layout of the sums of some parts, each of the shapes of `like`, in the order of their names."""
    named = {f"{part}/{name}": np.shape(values) for part in parts for name, values in like.items()}
    return {name: header_of("float32", torch.float64, tuple(shape)) for name, shape in sorted(named.items())}


def encode_sums(request: TrainRequest, found: Mapping[str, Sums]) -> RecordDict:
    """The content of the reply of a client that has evaluated.

    Args:
        request: That it answers.
        found: The sums of each part.
    """
    tensors: dict[str, Tensor] = {
        f"{part}/{name}": torch.as_tensor(values, dtype=torch.float64)
        for part, sums in found.items()
        for name, values in sums.items()
    }
    headers = {name: header_of("float32", torch.float64, tuple(t.shape)) for name, t in sorted(tensors.items())}
    said = {"round": request.round, "base_digest": request.base_digest, "parts": sorted(found)}
    head = note_head("sums", **said, layout=layout_digest(headers))
    buffer = joined(raw_bytes(tensors[name].contiguous()) for name in headers)
    return RecordDict(
        {"reply": ConfigRecord({"json": json.dumps(head)}), "sums": ArrayRecord({BUFFER: to_array(buffer)})}
    )


def check_sums(
    content: RecordDict, request: TrainRequest, like: Sums, parts: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """The sums in the content of a reply whose head was checked.

    Args:
        content: Of the reply.
        request: That it answers.
        like: Sums of some examples, of the shapes that are expected.
        parts: That were asked for; a client may leave some out.

    Returns:
        Part -> its sums.

    Raises:
        ReplyError: they are others than were asked for.
    """
    head = decode_head(content)
    buffer = require_buffer(content, RECORDS)
    require_same_round(head, request)
    said = head.get("parts")
    if not isinstance(said, list) or not said or any(part not in parts for part in said) or len(set(said)) < len(said):
        raise ReplyError(f"the reply is about {clean_text(said, 40)}, not {', '.join(parts)}", code="other-layout")
    headers = layout_of(like, said)
    require_layout(head, buffer, layout_digest(headers), sum(header.nbytes for header in headers.values()))
    raw = sliced(headers, buffer)
    values = {name: from_raw(raw[name], header.dtype, header.shape).numpy() for name, header in headers.items()}
    return {part: {name: values[f"{part}/{name}"] for name in like} for part in said}
