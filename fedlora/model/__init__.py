"""The transformers and PEFT boundary: load a base, inject an adapter, swap its values, follow base updates, export."""

import logging

from fedlora.model.base_model import Base
from fedlora.model.base_weights import BaseWeights
from fedlora.model.device import resolve_device, seeded
from fedlora.model.dtype import choose_dtype
from fedlora.model.export import put_in_place, save_adapter, save_merged
from fedlora.model.loading import base_key, load_base
from fedlora.model.plain import Recipe, Reference, verify_adapter, verify_merged
from fedlora.model.pretrained_adapter import changed_weights, load_adapted
from fedlora.model.quantize import unquantised

__all__ = [
    "Base",
    "BaseWeights",
    "Recipe",
    "Reference",
    "base_key",
    "changed_weights",
    "choose_dtype",
    "load_adapted",
    "load_base",
    "put_in_place",
    "resolve_device",
    "save_adapter",
    "save_merged",
    "seeded",
    "unquantised",
    "verify_adapter",
    "verify_merged",
]

# PEFT imports it, and it warns in each process of faster kernels that it would fetch from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
