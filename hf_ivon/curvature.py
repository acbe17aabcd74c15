"""Diagonal Hessians for models that were trained some other way: squared gradients, one example at a time.

The result is a posterior like IVON's, so that such models can be merged, sampled and inspected too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ivon import functional
from hf_ivon.posterior import Posterior, mean_digest, posterior_keys, unwrap
from hf_ivon.posterior_config import PosteriorConfig, library_versions
from hf_ivon.predict import evaluation_mode, logits_of

logger = logging.getLogger(__name__)

ESTIMATORS = ("squared-gradient", "ggn")
_IGNORED = -100


def estimate_posterior(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    estimator: str = "squared-gradient",
    weight_decay: float = 1e-5,
    train_size: int | None = None,
    seed: int = 0,
) -> Posterior:
    r"""Estimate a posterior around a trained model from the curvature of its loss on data.

    The Hessian is the diagonal Fisher information, :math:`h = \frac1N \sum_i E_y[(\nabla \log p(y | x_i))^2]` with the
    expectation over the model's own predictions, which for these losses is the Gauss-Newton matrix. It is taken by one
    label drawn from them (``"squared-gradient"``), or by all of them (``"ggn"``: for classification and regression, at
    the cost of a backward pass per class). The data's labels only say which tokens of a language model count.

    Args:
        model: A classifier with logits (batch, classes), a regression with (batch, 1), or a causal language model with
            (batch, tokens, vocabulary). Only parameters that require gradients get a Hessian.
        data: Batches, each a mapping of the model's arguments.
        estimator: ``"squared-gradient"`` or ``"ggn"``.
        weight_decay: Prior precision per example δ of the posterior, loss/param², > 0.
        train_size: What the model's training loss averaged over, λ of the posterior: examples, or label tokens of a
            language model; by default what `data` has.
        seed: Of the labels that are drawn.

    Returns:
        The posterior, tensors on the CPU.

    Raises:
        ValueError: If the estimator is unknown or does not go with the model, or the data is empty.

    Source:
        Daheim et al., arXiv:2310.12808, Section 4 (squared gradients of single examples, labels from the model).
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, got {estimator!r}. Choose one.")
    if not weight_decay > 0:
        raise ValueError(f"`weight_decay` must be positive, got {weight_decay!r}. It keeps the variances finite.")
    params = {name: p for name, p in posterior_keys(model).items() if p.requires_grad}
    if not params:
        raise ValueError("The model must have parameters that require gradients, got none. Unfreeze some.")
    generator = torch.Generator().manual_seed(seed)
    totals = {name: torch.zeros_like(p, dtype=torch.float64, device="cpu") for name, p in params.items()}
    examples, units, of_tokens = 0, 0, False
    squares = _Squares(unwrap(model), params)
    with evaluation_mode(model):
        for inputs, labels in _examples(data, squares.device):
            weighted, counted, of_tokens = _targets(model, inputs, labels, estimator, generator)
            for weight, target in weighted:
                for name, square in squares(inputs, target).items():
                    totals[name] += weight * square.double().cpu()
            examples += 1
            units += counted
    if not units:
        raise ValueError("`data` must hold examples that count, got none. Check the split, and its labels.")
    hess = {name: (total / units).float() for name, total in totals.items()}
    size = train_size or units
    average = sum(float(h.double().sum()) for h in hess.values()) / sum(h.numel() for h in hess.values())
    config = PosteriorConfig(
        ess=float(size),
        weight_decay=weight_decay,
        hess_init=max(average, 1e-30),
        num_examples=examples if of_tokens else size,
        num_tokens=size if of_tokens else None,
        steps=0,
        betas=(0.0, 0.0),
        estimator=estimator,
        mean_digest=mean_digest(params),
        versions=library_versions(),
    )
    variance = {
        name: functional.posterior_variance(h, ess=float(size), weight_decay=weight_decay) for name, h in hess.items()
    }
    return Posterior(variance, config)


class _Squares:
    """Squared gradients of one example's log-probability."""

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._params = params
        self.device = next(iter(params.values())).device

    def __call__(self, inputs: Mapping[str, Tensor], loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            value = loss(logits_of(self._model, inputs))
            grads = torch.autograd.grad(value, list(self._params.values()), allow_unused=True)
        pairs = zip(self._params.items(), grads, strict=True)
        return {name: torch.zeros_like(p) if g is None else g.detach().square() for (name, p), g in pairs}


def _examples(
    data: Iterable[Mapping[str, Any]], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Yield examples as batches of one, without what pads them."""
    for batch in data:
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        labels = tensors.pop("labels", None)
        for i in range(len(next(iter(tensors.values())))):
            one = {k: v[i : i + 1] for k, v in tensors.items()}
            target = None if labels is None else labels[i : i + 1]
            mask = one.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not mask.bool().all():
                kept = mask[0].bool()
                one = {k: v[:, kept] if v.dim() > 1 and v.shape[1] == len(kept) else v for k, v in one.items()}
                if target is not None and target.dim() == 2:
                    target = target[:, kept]
            yield one, target


def _targets(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor | None, estimator: str, generator: torch.Generator
) -> tuple[list[tuple[float, Callable[[Tensor], Tensor]]], int, bool]:
    """Return weighted negative log-probabilities of the logits, their units, and whether these are tokens."""
    with torch.no_grad():
        logits = logits_of(model, inputs).float().cpu()
    if logits.dim() == 3:
        if estimator == "ggn":
            raise ValueError("`estimator` must be 'squared-gradient' for a language model, got 'ggn'. Pass that.")
        counts = torch.ones(logits.shape[1] - 1, dtype=torch.bool)
        if labels is not None:
            counts = labels[0, 1:].cpu() != _IGNORED
        drawn = torch.multinomial(logits[0, :-1].softmax(-1), 1, generator=generator)[:, 0]
        drawn = torch.where(counts, drawn, torch.full_like(drawn, _IGNORED))

        def of_drawn(out: Tensor) -> Tensor:
            target = drawn.to(out.device)
            return nn.functional.cross_entropy(out[0, :-1].float(), target, reduction="sum")

        return [(1.0, of_drawn)] if counts.any() else [], int(counts.sum()), True
    if logits.shape[-1] == 1:
        # A Gaussian of unit variance: the gradient of its log-probability is the residual times that of the output.
        residual = 1.0 if estimator == "ggn" else float(torch.randn((), generator=generator))
        return [(1.0, lambda out: residual * out.float().sum())], 1, False
    probabilities = logits[0].softmax(-1)

    def of_class(c: int) -> Callable[[Tensor], Tensor]:
        return lambda out: -out[0].float().log_softmax(-1)[c]

    if estimator == "ggn":
        return [(float(p), of_class(c)) for c, p in enumerate(probabilities)], 1, False
    return [(1.0, of_class(int(torch.multinomial(probabilities, 1, generator=generator))))], 1, False
