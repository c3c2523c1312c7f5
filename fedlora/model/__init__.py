"""The transformers and PEFT boundary: load a base once, inject an adapter, swap its values, follow merges, export."""

from fedlora.model.adapted import changed_weights, load_adapted
from fedlora.model.base import Base
from fedlora.model.device import resolve_device, seeded
from fedlora.model.export import save_adapter, save_merged
from fedlora.model.loading import CacheInfo, cache_info, clear_cache, load_base
from fedlora.model.weights import BaseWeights

__all__ = [
    "Base",
    "BaseWeights",
    "CacheInfo",
    "cache_info",
    "changed_weights",
    "clear_cache",
    "load_adapted",
    "load_base",
    "resolve_device",
    "save_adapter",
    "save_merged",
    "seeded",
]
