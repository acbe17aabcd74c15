"""Predictions averaged over the posterior: one pass over the data for each weight sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_ivon.posterior import Posterior

_IGNORED = -100


@dataclass
class Prediction:
    """Predictions over a dataset, in its order.

    Attributes:
        probabilities: Class probabilities averaged over the weight samples, (N, C), fp32; None for regression.
        mean: Predicted value averaged over the weight samples, (N,), fp32; None for classification.
        variance: Variance of the predicted value over the weight samples, (N,); None for classification.
        labels: Labels, (N,), if the data has them.
        num_samples: Number of weight samples; 0 is the posterior mean.
    """

    probabilities: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    labels: Tensor | None
    num_samples: int


def posterior_predict(
    model: nn.Module,
    posterior: Posterior | None,
    data: Iterable[Mapping[str, Tensor]],
    *,
    num_samples: int,
    seed: int = 0,
) -> Prediction:
    """Predict classes or values with weights averaged over the posterior.

    Args:
        model: A model whose output has `logits` of shape (batch, C), holding the mean; C = 1 is regression.
        posterior: Its posterior; may be None if `num_samples` is 0.
        data: Batches as dictionaries of tensors, the same at every pass (a DataLoader without shuffling).
        num_samples: Number of weight samples, 0 for the mean alone. Sample i is the same whatever their number.
        seed: Seed of the weight noise.

    Returns:
        Averages; memory does not grow with `num_samples`.

    Raises:
        ValueError: If `num_samples` is negative, there is nothing to predict, or `posterior` is missing.
    """
    running: dict[str, Tensor] = {}
    labels: list[Tensor] = []

    def one_pass(sample: int) -> None:
        outputs = []
        for batch in data:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            if sample == 0 and "labels" in batch:
                labels.append(batch["labels"].cpu())
            outputs.append(_forward(model, inputs).logits.detach().float().cpu())
        if not outputs:
            raise ValueError(
                "`data` must hold at least one batch, got none. Pass a loader that can be iterated again."
            )
        logits = torch.cat(outputs)
        if logits.dim() != 2:
            raise ValueError(
                f"`model` must return logits (batch, C), got {tuple(logits.shape)}. Use `posterior_perplexity` "
                f"for a language model."
            )
        value = logits.softmax(-1) if logits.shape[1] > 1 else logits[:, 0]
        if sample == 0:
            running["mean"], running["squares"] = value, torch.zeros_like(value)
        else:  # Welford's running mean and sum of squared deviations
            delta = value - running["mean"]
            running["mean"] += delta / (sample + 1)
            running["squares"] += delta * (value - running["mean"])

    _for_each_sample(model, posterior, num_samples, seed, one_pass)
    mean = running["mean"]
    known = torch.cat(labels) if labels else None
    if mean.dim() == 2:
        return Prediction(mean, None, None, known, num_samples)
    return Prediction(None, mean, running["squares"] / max(1, num_samples), known, num_samples)


def posterior_perplexity(
    model: nn.Module,
    posterior: Posterior | None,
    data: Iterable[Mapping[str, Tensor]],
    *,
    num_samples: int,
    seed: int = 0,
) -> dict[str, float]:
    """Evaluate a causal language model with token probabilities averaged over the posterior.

    Args:
        model: A causal language model whose output has `logits` (batch, length, vocabulary), holding the mean.
        posterior: Its posterior; may be None if `num_samples` is 0.
        data: Batches as dictionaries of tensors with `labels`, the same at every pass; label -100 is ignored, and as
            in Transformers the label at a position is predicted from the position before it.
        num_samples: Number of weight samples, 0 for the mean alone. Sample i is the same whatever their number.
        seed: Seed of the weight noise.

    Returns:
        `perplexity`, `nll` (nats per token) and `num_tokens`.

    Raises:
        ValueError: If `num_samples` is negative, there is nothing to predict, or `posterior` is missing.
    """
    total: list[Tensor] = []  # log of the summed label probabilities, one tensor a batch: 4 bytes a token

    def one_pass(sample: int) -> None:
        for i, batch in enumerate(data):
            if "labels" not in batch:
                raise ValueError("`data` must have `labels` in every batch, got none. Use a collator that makes them.")
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            log_probs = _label_log_probs(_forward(model, inputs).logits, batch["labels"])
            if sample == 0:
                total.append(log_probs)
            else:
                total[i] = torch.logaddexp(total[i], log_probs)

    _for_each_sample(model, posterior, num_samples, seed, one_pass)
    tokens = torch.cat(total) if total else torch.empty(0)
    if len(tokens) == 0:
        raise ValueError(
            "`data` must hold at least one label to predict, got none. Check the block size and the labels."
        )
    nll = math.log(max(1, num_samples)) - tokens.double().mean().item()
    return {"perplexity": math.exp(nll), "nll": nll, "num_tokens": float(len(tokens))}


def _label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of every label that counts, (tokens,)."""
    labels = labels[:, 1:].to(logits.device)
    kept = labels != _IGNORED
    chosen = logits.detach()[:, :-1][kept].float()
    return chosen.log_softmax(-1).gather(-1, labels[kept][:, None])[:, 0].cpu()


def _forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    device = next(model.parameters()).device
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})


def _for_each_sample(
    model: nn.Module, posterior: Posterior | None, num_samples: int, seed: int, one_pass: Callable[[int], None]
) -> None:
    if num_samples < 0:
        raise ValueError(f"`num_samples` must be at least 0, got {num_samples!r}. 0 predicts at the mean.")
    if num_samples > 0 and posterior is None:
        raise ValueError("`posterior` must be given when `num_samples` is above 0, got None. Pass 0 to use the mean.")
    with torch.no_grad(), _evaluating(model):
        for sample in range(max(1, num_samples)):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
            drawn = nullcontext() if num_samples == 0 or posterior is None else posterior.sampled(model, generator)
            with drawn:
                one_pass(sample)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
