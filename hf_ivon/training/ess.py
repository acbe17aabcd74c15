"""How much data a loss averages over: what `ess=auto` and `batch_size=auto` mean, and the N that is saved."""

from __future__ import annotations

import logging
import random
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_ivon.mean import unwrap

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 1000
_BATCH = 8


@dataclass(frozen=True)
class TrainingSize:
    """Size of a training set.

    Attributes:
        num_examples: Number of examples.
        num_tokens: Number of label tokens, for a loss that averages over tokens; None for one that averages over
            examples.
        estimated: Whether `num_tokens` was extrapolated from a part of the examples.
    """

    num_examples: int
    num_tokens: int | None
    estimated: bool

    @property
    def ess(self) -> int:
        """What the loss averages over."""
        return self.num_examples if self.num_tokens is None else self.num_tokens


def training_size(trainer: Trainer) -> TrainingSize | None:
    """Measure a Trainer's training set.

    Label tokens are counted in what the data collator makes of at most 1,000 evenly spaced examples; the random number
    generators are put back afterwards, so that looking at the data does not change the training.

    Args:
        trainer: A Trainer with its model, collator and training set.

    Returns:
        The size; None if the dataset has no length, or its examples cannot be picked by index.
    """
    dataset = trainer.train_dataset
    if isinstance(dataset, dict):  # several sets, as sentence-transformers takes them, whose losses are of examples
        dataset = torch.utils.data.ConcatDataset(dataset.values())
    try:
        num_examples = len(dataset)
    except TypeError:
        return None
    if isinstance(dataset, IterableDataset):
        return None
    if num_examples == 0:
        return TrainingSize(0, None, False)
    picked = min(num_examples, _MAX_EXAMPLES)
    indices = [i * num_examples // picked for i in range(picked)]
    counts: list[int] = []
    with _untouched_randomness():
        for labels in _label_batches(trainer, dataset, indices):
            if labels is None or labels.dim() < 2 or labels.is_floating_point():
                return TrainingSize(num_examples, None, False)
            labels = labels[:, 1:] if _is_shifted(trainer) else labels
            counts += (labels != -100).flatten(1).sum(1).tolist()
    # Packed blocks all hold the same number of tokens: then nothing is extrapolated.
    exact = picked == num_examples or len(set(counts)) == 1
    return TrainingSize(num_examples, round(sum(counts) / picked * num_examples), not exact)


def resolve_ess(trainer: Trainer, size: TrainingSize | None) -> float:
    """Return the effective sample size that ``ess=auto`` stands for, and log it.

    Args:
        trainer: The Trainer.
        size: What `training_size` returned for it.

    Returns:
        Number of examples or label tokens.

    Raises:
        ValueError: If the training set has no length, or is empty.
    """
    if size is None or size.ess <= 0:
        what = "has no length" if size is None else f"has {size.ess} of what the loss averages over"
        raise ValueError(
            f"`ivon_ess` must be a number when it cannot be counted, and the training set "
            f"({type(trainer.train_dataset).__name__}) {what}. Pass --ivon_ess: the number of training examples, or "
            f"of label tokens for a language model."
        )
    unit = "training examples" if size.num_tokens is None else "label tokens"
    logger.info("ess=auto: %d %s%s.", size.ess, unit, " (estimated)" if size.estimated else "")
    return float(size.ess)


def resolve_batch_size(trainer: Trainer, size: TrainingSize | None, options: Mapping[str, Any]) -> float:
    """Return `batch_size`; ``"auto"`` stands for what the loss of an optimizer step averages over.

    Args:
        trainer: The Trainer.
        size: What `training_size` returned for it.
        options: IVON's; `batch_size` and `hess_approx` are read, and only ``"fisher"`` uses the former.

    Returns:
        The number given; or that of examples, or of label tokens in an average batch, of all processes and
        micro-batches together, 1 for the estimators that do not use it.

    Raises:
        ValueError: If the training set has no length, or is empty.
    """
    if options["batch_size"] != "auto":
        return options["batch_size"]
    if options["hess_approx"] != "fisher":
        return 1.0
    if size is None or size.ess <= 0:
        raise ValueError(
            "`ivon_batch_size` must be a number for hess_approx='fisher' when the training set has no length. Pass "
            "--ivon_batch_size: the examples of an optimizer step, or the label tokens for a language model."
        )
    args = trainer.args
    examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return min(examples, size.num_examples) * size.ess / size.num_examples


def _label_batches(trainer: Trainer, dataset: Any, indices: list[int]) -> Iterator[torch.Tensor | None]:
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
    names = trainer.label_names or ["labels"]
    for start in range(0, len(indices), _BATCH):
        batch = collate([dataset[i] for i in indices[start : start + _BATCH]])
        labels = next((batch[name] for name in names if name in batch), None)
        yield labels if isinstance(labels, torch.Tensor) else None


def _is_shifted(trainer: Trainer) -> bool:
    """Tell whether the model predicts each label from those before it, so that a sequence's first is not predicted."""
    model = unwrap(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    by_class = any(cls.__name__ in causal for cls in type(model).__mro__)
    # The Trainer looks at the loss function, which not every model names; models of images and text name it.
    return by_class or getattr(trainer, "_loss_shifts_labels", False)


@contextmanager
def _untouched_randomness() -> Generator[None, None, None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
