"""Adapters as plain ArrayRecords of PEFT's tensors: what other people's apps send, and Flower's own strategies average.

Names are PEFT's, as `get_peft_model_state_dict` gives them ("base_model.model.layer.q.lora_A.weight") or as they stand
in the model ("...lora_A.default.weight"); every other tensor is dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.errors import ReplyError
from fedlora.model.export import PREFIX

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight$")


@dataclass(frozen=True)
class PeftNames:
    """Names of the tensors of one record, and those that fedlora has for them.

    Args:
        own: Name in the record -> name in `AdapterState.tensors`.
        shapes: Name in the record -> shape.
        dtypes: Name in the record -> dtype.
    """

    own: Mapping[str, str]
    shapes: Mapping[str, torch.Size] = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(repr=False)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PeftNames:
        """Of the tensors of a record.

        Raises:
            ReplyError: a module has one factor alone.
        """
        own = {name: own_name(name) for name in tensors}
        known = set(own.values())
        for name, mine in own.items():
            module, mark, factor = mine.rpartition(":")
            if mark and f"{module}:{'B' if factor == 'A' else 'A'}" not in known:
                raise ReplyError(
                    f"{name!r} has no other factor: send lora_A and lora_B of each module", code="factor-missing"
                )
        shapes = {name: value.shape for name, value in tensors.items()}
        return cls(own, shapes, {name: value.dtype for name, value in tensors.items()})

    def read(self, record: ArrayRecord, scale: float | Mapping[str, float]) -> AdapterState:
        """The adapter in a record with these names.

        Args:
            record: Record of PEFT's tensors.
            scale: alpha / r, one for all modules or one for each.

        Raises:
            ReplyError: it lacks a tensor, has another, or one of another shape, type or that is not finite.
        """
        tensors = tensors_of(record)
        if odd := tensors.keys() ^ self.own.keys():
            side = "has an unknown" if min(odd) in tensors else "lacks the"
            raise ReplyError(f"its record {side} tensor {min(odd)!r}", code="unexpected-tensors")
        for name, value in tensors.items():
            if value.shape != self.shapes[name]:
                raise ReplyError(
                    f"{name!r} has shape {list(value.shape)}, not {list(self.shapes[name])}", code="unexpected-shape"
                )
            if not (value.is_floating_point() and bool(torch.isfinite(value).all())):
                raise ReplyError(f"{name!r} holds values that are no finite numbers", code="not-finite")
        mine = {self.own[name]: value.to(self.dtypes[name]) for name, value in tensors.items()}
        modules = [name.removesuffix(":A") for name in mine if name.endswith(":A")]
        pairs = {
            module: LoraPair(
                mine[f"{module}:A"],
                mine[f"{module}:B"],
                scale if isinstance(scale, float) else scale[module],
            )
            for module in modules
        }
        dense = {name: value for name, value in mine.items() if not name.endswith((":A", ":B"))}
        return AdapterState(pairs, dense)

    def write(self, adapter: AdapterState) -> ArrayRecord:
        """A record with these names."""
        mine = adapter.tensors()
        return record_of({name: mine[own] for name, own in self.own.items()})


def own_name(name: str) -> str:
    """The name that `AdapterState.tensors` has for one of PEFT's.

    Example:
        >>> own_name("base_model.model.layer.q.lora_A.default.weight")
        'layer.q:A'
    """
    name = name.removeprefix(PREFIX)
    found = _FACTOR.match(name)
    if found is None:
        return re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", name)
    return f"{found['module']}:{found['factor']}"


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """A record's tensors.

    Raises:
        ReplyError: they cannot be read.
    """
    try:
        return dict(record.to_torch_state_dict())
    except Exception as error:
        raise ReplyError(f"its arrays cannot be read: {error}", code="unreadable-arrays") from None


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A record of tensors; half types, which Flower's arrays do not take, as float32."""
    plain = {
        name: value.detach().cpu().float() if value.dtype in (torch.bfloat16, torch.float16) else value.detach().cpu()
        for name, value in tensors.items()
    }
    return ArrayRecord({name: value.contiguous() for name, value in plain.items()})
