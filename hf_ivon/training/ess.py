"""Options that stand for something of the data or the model: `ess=auto`, `batch_size=auto`, `relative_sigma`."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import find_batch_size

from hf_ivon import distributed
from hf_ivon.mean import unwrap

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_RESUMED = ("hess_approx", "ess", "hess_init", "weight_decay", "beta1", "beta2", "clip_radius", "mc_samples")

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
        rows: Rows that the data collator makes of an example: 2 of a pair; 0 if they are not a whole number.
    """

    num_examples: int
    num_tokens: int | None
    estimated: bool
    rows: int = 1

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
    with untouched_randomness():
        for examples, batch in _batches(trainer, dataset, indices):
            labels = labels_of(trainer, batch)
            if labels is None or labels.dim() < 2 or labels.is_floating_point():
                rows, rest = divmod(find_batch_size(batch if labels is None else labels) or 0, examples)
                return TrainingSize(num_examples, None, False, 0 if rest else rows)
            counts += num_label_tokens(trainer, labels).tolist()
    # Packed blocks all hold the same number of tokens: then nothing is extrapolated.
    exact = picked == num_examples or len(set(counts)) == 1
    return TrainingSize(num_examples, round(sum(counts) / picked * num_examples), not exact)


def resolve_ess(trainer: Trainer, size: TrainingSize | None, options: Mapping[str, Any]) -> float:
    """Return the effective sample size, and log what ``"auto"`` stands for.

    Args:
        trainer: The Trainer.
        size: What `training_size` returned for it.
        options: IVON's; `ess` and `temperature` are read.

    Returns:
        The number given; or for ``"auto"`` that of examples or label tokens, divided by the temperature.

    Raises:
        ValueError: If it is to be counted and the training set has no length, or is empty.
    """
    if options["ess"] != "auto":
        return options["ess"]
    if size is None or size.ess <= 0:
        what = "has no length" if size is None else f"has {size.ess} of what the loss averages over"
        raise ValueError(
            f"`ivon_ess` must be a number when it cannot be counted, and the training set "
            f"({type(trainer.train_dataset).__name__}) {what}. Pass --ivon_ess: the number of training examples, or "
            f"of label tokens for a language model."
        )
    unit = "training examples" if size.num_tokens is None else "label tokens"
    logger.info("ess=auto: %d %s%s.", size.ess, unit, " (estimated)" if size.estimated else "")
    return size.ess / options["temperature"]


def precision_of_sigma(model: nn.Module, options: Mapping[str, Any]) -> dict[str, float]:
    r"""Return what `relative_sigma` stands for, and log it.

    With :math:`r` times the root mean square of the trained weights for :math:`\sigma`, that is
    :math:`h + \delta = 1/(\lambda \sigma^2)`: solved for :math:`h_0`, or for ``"fisher"``, which soon forgets
    :math:`h_0`, for :math:`\delta` with :math:`h = 0`; the prior is then as wide as that.

    Args:
        model: The model, with the weights that training starts from.
        options: IVON's; `relative_sigma`, `hess_approx`, `ess` and, unless that is set, `weight_decay` are read.

    Returns:
        `hess_init`, or `weight_decay`, > 0.

    Raises:
        ValueError: If all trained weights are zero, or the prior alone is narrower.
    """
    relative, ess, weight_decay = (options[name] for name in ("relative_sigma", "ess", "weight_decay"))
    sigma = relative * _root_mean_square(model)
    if sigma == 0:
        raise ValueError(
            f"`ivon_relative_sigma` must be 0 with trained weights that are all zero, got {relative}. Set "
            f"`ivon_hess_init` and `weight_decay` instead."
        )
    precision = 1.0 / (ess * sigma**2)
    if options["hess_approx"] == "fisher":
        found = {"weight_decay": precision}
    elif precision > weight_decay:
        found = {"hess_init": precision - weight_decay}
    else:
        raise ValueError(
            f"`ivon_relative_sigma` must be below {relative * (precision / weight_decay) ** 0.5:.2g} with ess={ess:g} "
            f"and weight_decay={weight_decay:g}, got {relative}: the prior alone is narrower. Lower one of them."
        )
    name, value = next(iter(found.items()))
    logger.info("relative_sigma=%g: sigma %.2g at most, %s %.3g.", relative, sigma, name, value)
    return found


def _root_mean_square(model: nn.Module) -> float:
    """Return that of the trained weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    squares = sum(float(distributed.full(p).double().square().sum()) for p in weights)
    return float((squares / sum(p.numel() for p in weights)) ** 0.5)


def check_fisher_sigma(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Warn if the noise of weights without curvature, which the prior alone bounds, is wider than the weights are.

    Args:
        model: The model, with the weights that training starts from.
        options: IVON's; `hess_approx`, `ess` and `weight_decay` are read.
    """
    if options["hess_approx"] != "fisher" or not options["weight_decay"]:
        return
    sigma, typical = (options["ess"] * options["weight_decay"]) ** -0.5, _root_mean_square(model)
    if sigma > typical > 0:
        logger.warning(
            "With ess=%g and weight_decay=%g the noise of a weight without curvature is %.2g, and the root mean "
            "square of the trained weights is %.2g: training will destroy the model. Pass a larger --weight_decay, or "
            "--ivon_preset finetuning without one, which sets it by the weights.",
            options["ess"],
            options["weight_decay"],
            sigma,
            typical,
        )


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
    # The Trainer's own, which `auto_find_batch_size` makes smaller.
    examples = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    return min(examples, size.num_examples) * size.ess / size.num_examples


def labels_of(trainer: Trainer, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the labels in what the data collator made; None if there are none, or not one tensor."""
    names = trainer.label_names or ["labels"]
    labels = next((batch[name] for name in names if name in batch), None)
    return labels if isinstance(labels, torch.Tensor) else None


def num_label_tokens(trainer: Trainer, labels: torch.Tensor) -> torch.Tensor:
    """Return the number of labels in each row, (rows, tokens), that a loss over tokens averages over: (rows,)."""
    labels = labels[:, 1:] if _is_shifted(trainer) else labels
    return (labels != -100).flatten(1).sum(1)


def _batches(trainer: Trainer, dataset: Any, indices: list[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield numbers of examples and what the data collator makes of them, which may change what it is given."""
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
    size = min(_BATCH, trainer._train_batch_size)  # larger ones may not go together: unpadded examples go one by one
    for start in range(0, len(indices), size):
        rows = [dataset[i] for i in indices[start : start + size]]
        yield len(rows), collate([copy.copy(row) if isinstance(row, dict) else row for row in rows])


def _is_shifted(trainer: Trainer) -> bool:
    """Tell whether the model predicts each label from those before it, so that a sequence's first is not predicted."""
    model = unwrap(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    by_class = any(cls.__name__ in causal for cls in type(model).__mro__)
    # The Trainer looks at the loss function, which not every model names; models of images and text name it.
    return by_class or getattr(trainer, "_loss_shifts_labels", False)


@contextmanager
def untouched_randomness(device: torch.device | None = None) -> Generator[None, None, None]:
    """Put the random number generators back: Python's, NumPy's, torch's on the CPU and on a device."""
    python, numpy = random.getstate(), np.random.get_state()
    on_device = device is not None and device.type not in ("cpu", "mps")
    try:
        with torch.random.fork_rng([device] if on_device else [], device_type=device.type if on_device else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def settle_resumed(
    asked: Sequence[Mapping[str, Any]], groups: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> None:
    """Say which options a resumed run keeps of its checkpoint though others are asked for.

    `eval_ess_scale`, which training does not depend on, becomes what is asked for.

    Args:
        asked: Groups of the optimizer before the state was loaded.
        groups: The groups now. Written to.
        options: What the arguments say; `relative_sigma` is read.
    """
    # What that stands for follows from the weights of the first start.
    derived = ("hess_init", "weight_decay") if options["relative_sigma"] else ()
    kept = {}
    for before, group in zip(asked, groups, strict=True):
        group["eval_ess_scale"] = before["eval_ess_scale"]
        for name in _RESUMED:
            if name not in derived and before[name] != group[name]:
                kept[name] = f"{name}={group[name]} (and not {before[name]})"
    if kept:
        logger.warning(
            "A resumed run keeps the options of its checkpoint: %s. For others, start a new one.",
            ", ".join(kept.values()),
        )
