"""IVON in a training loop with Accelerate: weight samples through the wrapper that `accelerator.prepare` returns."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_ivon.optim import IVON

if TYPE_CHECKING:
    from accelerate import Accelerator


def unwrap_ivon(optimizer: Any) -> IVON | None:
    """Return the IVON optimizer inside Accelerate's wrapper.

    Args:
        optimizer: An optimizer, wrapped or not, or None.

    Returns:
        The IVON optimizer; None if it is another one.
    """
    while optimizer is not None and not isinstance(optimizer, IVON):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def grad_scale(accelerator: Accelerator) -> float | Tensor | None:
    """Return the loss scale that gradients carry in fp16 training, as a 0-dim tensor where reading it would wait.

    Args:
        accelerator: The accelerator.

    Returns:
        The scale; None without a scaler.
    """
    scaler = accelerator.scaler
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.get_scale() if scaler._scale is None else scaler._scale


@contextmanager
def sampled_params(
    accelerator: Accelerator, optimizer: Any, train: bool = True, weight: float = 1.0
) -> Generator[None, None, None]:
    """Sample the weights in a loop with Accelerate: `IVON.sampled_params` for a prepared optimizer.

    One optimizer step of a loop, with accumulation, mixed precision and several processes as Accelerate has them::

        with accelerator.accumulate(model):
            with sampled_params(accelerator, optimizer):
                accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # if accelerator.sync_gradients
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    Args:
        accelerator: The accelerator that prepared the optimizer.
        optimizer: What `accelerator.prepare` returned for IVON.
        train: Take the gradients of this context into the next step; without it the sample is for prediction.
        weight: Factor on the gradients of this context, > 0: 1/S for S samples of one micro-batch.

    Raises:
        TypeError: If the optimizer is not IVON.
    """
    ivon = unwrap_ivon(optimizer)
    if ivon is None:
        raise TypeError(f"`optimizer` must be IVON, prepared or not, got {type(optimizer).__name__}. Pass IVON.")
    with ivon.sampled_params(train=train, weight=weight, grad_scale=grad_scale(accelerator) if train else None):
        yield
