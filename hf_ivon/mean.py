"""The mean of a posterior: its tensors' names in the model's own file, and whether the two belong together."""

from __future__ import annotations

import hashlib
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_ivon import distributed

T = TypeVar("T", bound=Tensor)

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of DistributedDataParallel and `torch.compile`."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model


def posterior_keys(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by the name that their mean has in the model's own file.

    Args:
        model: Any module; wrappers of DDP and `torch.compile` are seen through. For a PEFT model only the adapter's
            tensors are returned, by their names in `adapter_model.safetensors`.

    Returns:
        Name to parameter; tied parameters once.

    Raises:
        ValueError: If several adapters of a PEFT model are active: their files use the same names.
    """
    model = unwrap(model)
    return _file_keys(model, dict(model.named_parameters()))


def buffer_keys(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the model's own file holds, such as the running statistics of batch normalization.

    Args:
        model: Any module, as for `posterior_keys`.

    Returns:
        Name in the file to buffer.
    """
    model = unwrap(model)
    named = {
        f"{place}.{name}" if place else name: buffer
        for place, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return _file_keys(model, named)


def _file_keys(model: nn.Module, named: dict[str, T]) -> dict[str, T]:
    """Return tensors of a model by their names in its own file, those that it holds."""
    peft = sys.modules.get("peft")  # a PeftModel cannot exist unless peft was imported
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in named.items()}
    if not named or peft is None or not isinstance(model, peft.PeftModel):
        return named
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The model must have one active adapter, got {model.active_adapters!r}. Choose one with `set_adapter`."
        )
    by_storage = {(own.data_ptr(), own.shape): own for own in named.values()}
    # "auto", the default of the last argument, asks the Hub for the base model's vocabulary, at every call.
    adapter = peft.get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    keys: dict[T, str] = {}
    for key, tensor in adapter.items():
        own = by_storage.get((tensor.data_ptr(), tensor.shape))
        if own is not None:
            keys.setdefault(own, key)  # the file repeats tied tensors
    return {key: own for own, key in keys.items()}


def match_problems(expected: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Compare names and shapes.

    Args:
        expected: Name to something with a `shape`: what must be there.
        present: Name to something with a `shape`: what is there; more than expected is fine.

    Returns:
        Problems, one string each, long lists shortened.
    """
    missing = sorted(set(expected) - set(present))
    problems = []
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"the model lacks {', '.join(f'`{name}`' for name in missing[:3])}{rest}")
    for name in sorted(set(expected) & set(present)):
        if tuple(expected[name].shape) != tuple(present[name].shape):
            problems.append(
                f"`{name}` has shape {tuple(expected[name].shape)} in the posterior and "
                f"{tuple(present[name].shape)} in the model"
            )
    return problems


def mean_digest(mean: Mapping[str, Tensor], names: Iterable[str] | None = None, prefix: str = "") -> str:
    """Return a digest that pairs a posterior with the mean it belongs to.

    Args:
        mean: Tensors by name.
        names: Which of them; None is all.
        prefix: What the posterior's names have before these, where the mean is a module of what was trained.

    Returns:
        SHA-256 over names, dtypes, shapes and raw bytes, in the order of names, as a hexadecimal string.
    """
    digest = hashlib.sha256()
    for name in sorted(mean if names is None else names):
        tensor = distributed.full(mean[name]).cpu().contiguous()
        digest.update(f"{prefix}{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_lock(model: nn.Module) -> threading.RLock:
    """Return the lock of a model, which whoever puts weight samples into it, or works at its mean, holds meanwhile.

    Args:
        model: The model; wrappers, and adapters of PEFT on one base, share a lock.

    Returns:
        The same lock for the same model; one thread can take it several times, for contexts inside each other.
    """
    inner: Any = unwrap(model)
    return _LOCKS.setdefault(inner.get_base_model() if hasattr(inner, "get_base_model") else inner, threading.RLock())


def write_back(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write saved values into parameters; an interrupt in between is raised after all of them are in place."""
    try:
        _write(saved)
    except BaseException:  # writing twice is harmless, half is not
        _write(saved)
        raise
    torch.clear_autocast_cache()


def _write(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for p, mean in reversed(saved):  # of two parameters on one storage, the first was saved before any write
            p.copy_(mean)
