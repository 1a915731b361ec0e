"""From files to batches: sources, the token store, packing, the loader. Needs a tokenizer, knows nothing of models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moai_llm.data.balance import HierarchicalBalancePacker

__all__ = ["HierarchicalBalancePacker"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moai_llm.data' has no attribute {name!r}")
    return getattr(import_module("moai_llm.data.balance"), name)
