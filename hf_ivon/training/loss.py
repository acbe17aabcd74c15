"""The loss of an optimizer step: whether it obeys the Trainer's count of items, and how many it averages over."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers.trainer_pt_utils import find_batch_size

from hf_ivon import distributed
from hf_ivon.training.ess import TrainingSize, labels_of, num_label_tokens, untouched_randomness

if TYPE_CHECKING:
    from hf_ivon.training.trainer import IVONTrainer

logger = logging.getLogger(__name__)

# What the look at a loss may find, in the order in which it counts among processes.
_NO_LABELS, _IGNORES, _OBEYS, _FAILED = range(4)


def check_loss_scale(
    trainer: IVONTrainer, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int | None
) -> bool:
    """Find out whether the loss obeys `num_items_in_batch`; if not, let the Trainer divide it.

    The Trainer believes so of every model that takes keyword arguments, but many heads drop them, and their loss is
    then too large by the number of micro-batches (huggingface/transformers#47688), and by that of processes. AdamW
    forgives a constant factor on the gradient; a Hessian does not.

    Args:
        trainer: The Trainer; its `model_accepts_loss_kwargs` may be changed.
        model: The model.
        inputs: One micro-batch.
        num_items: Number of items that the Trainer counted for the whole step.

    Returns:
        Whether that is settled; if not, the next micro-batch is to be asked.
    """
    args = trainer.args
    decided = getattr(trainer, "loss_is_scaled_for_ga", None) is not None or trainer.compute_loss_func is not None
    whole = args.gradient_accumulation_steps * args.world_size == 1
    if whole or decided or num_items is None or not trainer.model_accepts_loss_kwargs:
        return False
    found = _look_at_loss(trainer, model, inputs, num_items)
    if args.world_size > 1:  # the Trainer counts together with the others: all must believe the same
        found = int(trainer.accelerator.gather(torch.tensor([found], device=args.device)).max())
    if found == _IGNORES:
        trainer.model_accepts_loss_kwargs = False
        logger.info("%s ignores `num_items_in_batch`; losses of micro-batches are averaged.", type(model).__name__)
    return found != _NO_LABELS


@torch.no_grad()
def _look_at_loss(
    trainer: IVONTrainer, model: nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | int
) -> int:
    """Compare the loss with that for twice the number of items, which is half of it if the loss obeys."""
    losses = []
    try:
        with _without_a_trace(trainer, model):
            model.train()  # some models have a loss in training only
            for factor in (1, 2):
                with untouched_randomness(trainer.args.device), trainer.compute_loss_context_manager():
                    batch = trainer._prepare_inputs(copy.copy(inputs))
                    loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items * factor)
                losses.append(float(loss.abs().sum()))
    except Exception as err:
        if should_reduce_batch_size(err):
            raise
        logger.warning(
            "Whether the loss obeys `num_items_in_batch` could not be found out: %s: %s. It is believed, as the "
            "Trainer does. If it is a mean over each micro-batch, set `trainer.model_accepts_loss_kwargs = False`.",
            type(err).__name__,
            err,
        )
        return _FAILED
    once, twice = losses
    if not (0 < once < math.inf):
        return _NO_LABELS
    return _OBEYS if twice < 0.75 * once else _IGNORES


@contextmanager
def _without_a_trace(trainer: IVONTrainer, model: nn.Module) -> Generator[None, None, None]:
    """Put back what computing a loss may change: modes and buffers of the model, numbers that the Trainer keeps."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    kept = {
        name: _copied(value)
        for name, value in vars(trainer).items()
        if isinstance(value, (int, float)) or (isinstance(value, dict) and "metrics" in name)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checkpointing, which misses gradients
            yield
    finally:
        vars(trainer).update(kept)
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, training in modes:
            module.training = training


def _copied(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists, of what is in them not."""
    if isinstance(value, dict):
        other = copy.copy(value)
        other.update({key: _copied(item) for key, item in value.items()})
        return other
    return copy.copy(value) if isinstance(value, list) else value


class StepSize:
    r"""Sets `batch_size` for each optimizer step to what its loss averages over, as ``"fisher"`` needs it.

    The last batch and the last window of an epoch are smaller than the others; with a constant, their squared
    gradients would count several times. With items of gradient variance :math:`h`, the estimate is unbiased for
    :math:`B = h / \mathrm{Var}(\hat g)`: the number of items :math:`n` of a loss that is their sum over their number,
    and :math:`J^2 / \sum_j 1 / n_j` of a loss that averages over :math:`J` parts which are averages themselves.

    Args:
        size: Of the training set: says whether items are examples or label tokens.
    """

    def __init__(self, size: TrainingSize) -> None:
        self._size = size
        self._window: int | None = None
        self._items = self._inverse = 0.0

    def items(self, trainer: IVONTrainer, inputs: Any) -> float:
        """Return the number of items in a micro-batch; NaN if it cannot be told."""
        labels = labels_of(trainer, inputs)
        if self._size.num_tokens is not None:
            known = labels is not None and labels.dim() >= 2
            return float(num_label_tokens(trainer, labels).sum()) if known else math.nan
        rows = find_batch_size(inputs if labels is None else labels)
        return math.nan if rows is None or not self._size.rows else rows / self._size.rows

    def add(self, trainer: IVONTrainer, items: float, num_items: torch.Tensor | int | None) -> None:
        """Count a micro-batch after its backward pass; what cannot be counted leaves `batch_size` as it is.

        Args:
            trainer: The Trainer.
            items: What `items` returned for it.
            num_items: Number of items that the Trainer counted for the whole step.
        """
        args, groups = trainer.args, trainer.ivon.param_groups
        if groups[0]["window"] != self._window:
            self._window, self._items, self._inverse = groups[0]["window"], 0.0, 0.0
        self._items += items
        self._inverse += 1.0 / items if items else 0.0  # without items there is no gradient
        said = getattr(trainer, "loss_is_scaled_for_ga", None)
        by_count = trainer.model_accepts_loss_kwargs and num_items is not None
        summed = (by_count or trainer.compute_loss_func is not None) if said is None else said
        variance = 1.0 / self._items if summed and self._items else self._inverse / self._parts(trainer) ** 2
        total = self._items
        if args.world_size > 1:
            if not trainer.accelerator.sync_gradients:
                return
            both = torch.tensor([total, variance], dtype=torch.float64, device=args.device)
            distributed.average_([both])
            total, variance = both.tolist()
        together = summed and (args.world_size == 1 or args.average_tokens_across_devices)
        size = total if together else 1.0 / variance if variance else 0.0
        if 0 < size < math.inf:
            for group in groups:
                group["batch_size"] = size * args.world_size

    def _parts(self, trainer: IVONTrainer) -> int:
        """Return the number that the Trainer divides losses by."""
        return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
