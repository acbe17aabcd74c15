"""Merging finetuned models: `hf_ivon.merge(...)`; the rules are in `methods`, what a merge will do in `plan`."""

import sys
from types import ModuleType
from typing import Any

from hf_ivon.merge.engine import merge
from hf_ivon.merge.heads import load_head

__all__ = ["load_head", "merge"]


class _CallableModule(ModuleType):
    """Makes `hf_ivon.merge(...)` the function, while `hf_ivon.merge.methods` stays a module."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Merge models; see `hf_ivon.merge.engine.merge`."""
        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
