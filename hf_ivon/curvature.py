"""Diagonal Hessians for models that were trained some other way: squared gradients, one example at a time.

The result is a posterior like IVON's, so that such models can be merged, sampled and inspected too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ivon import functional
from hf_ivon.data import is_language_model
from hf_ivon.mean import mean_digest, posterior_keys, unwrap
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig, library_versions
from hf_ivon.predict import evaluation_mode, logits_of

ESTIMATORS = ("squared-gradient", "ggn")
_IGNORED = -100


def estimate_posterior(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    estimator: str = "squared-gradient",
    weight_decay: float = 1e-5,
    train_size: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Posterior:
    r"""Estimate a posterior around a trained model from the curvature of its loss on data.

    The Hessian is the diagonal Fisher information, :math:`h = \frac1N \sum_i E_y[(\nabla \log p(y | x_i))^2]` with the
    expectation over the model's own predictions, which for these losses is the Gauss-Newton matrix. It is taken by one
    label drawn from them (``"squared-gradient"``), or by all of them (``"ggn"``: for classification and regression, at
    the cost of a backward pass per class). The data's labels only say which tokens count.

    Outputs are a softmax's, unless the model's `problem_type` says other: of ``"multi_label_classification"`` each is
    a yes or no of its own, of ``"regression"``, or of a model with one output, each is the mean of a Gaussian of unit
    variance.

    Args:
        model: A classifier or a regression with logits (batch, outputs), a causal language model with (batch, tokens,
            vocabulary), or another model that classifies tokens, with (batch, tokens, classes). Only parameters that
            require gradients get a Hessian.
        data: Batches, each a mapping of the model's arguments. Tokens whose label is -100 do not count; a language
            model can do without labels, a classifier of tokens cannot.
        estimator: ``"squared-gradient"`` or ``"ggn"``.
        weight_decay: Prior precision per example δ of the posterior, loss/param², > 0.
        train_size: What the model's training loss averaged over, λ of the posterior: examples, or label tokens of a
            language model; by default what `data` has.
        scale: How many times as much the training data was as `data`; goes into λ where `train_size` is not given.
        seed: Of the labels that are drawn.

    Returns:
        The posterior, tensors on the CPU.

    Raises:
        ValueError: If the estimator is unknown or does not go with the model, if the data is empty, or if its labels
            do not fit the model.

    Source:
        Daheim et al., arXiv:2310.12808, Section 4 (squared gradients of single examples, labels from the model).
    """
    check_settings(estimator, weight_decay, train_size, scale)
    params = {name: p for name, p in posterior_keys(model).items() if p.requires_grad}
    if not params:
        raise ValueError("The model must have parameters that require gradients, got none. Unfreeze some.")
    bare = unwrap(model)
    generator = torch.Generator().manual_seed(seed)
    totals = _Totals(params)
    examples, units, of_tokens = 0, 0, False
    with evaluation_mode(model), torch.enable_grad():
        for inputs, labels in single_examples(data, next(iter(params.values())).device):
            logits = logits_of(bare, inputs)
            weighted, counted, of_tokens = _losses(bare, logits, labels, estimator, generator)
            totals.add(weighted)
            examples += 1
            units += counted
    if not units:
        raise ValueError("`data` must hold examples that count, got none. Check the split, and its labels.")
    hess = {name: total.float().cpu().div_(units) for name, total in totals.sums().items()}
    size = train_size or max(1, round(units * scale))
    average = sum(float(h.double().sum()) for h in hess.values()) / sum(h.numel() for h in hess.values())
    config = PosteriorConfig(
        ess=float(size),
        weight_decay=weight_decay,
        hess_init=max(average, 1e-30),
        num_examples=max(1, round(examples * scale)) if of_tokens else size,
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


def check_settings(estimator: str, weight_decay: float, train_size: int | None = None, scale: float = 1.0) -> None:
    """Raise a `ValueError` for an unknown estimator, or a number that is not positive and finite."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATORS)}, got {estimator!r}. Choose one.")
    if not 0 < weight_decay < math.inf:
        raise ValueError(
            f"`weight_decay` must be positive and finite, got {weight_decay!r}. It keeps the variances finite."
        )
    if train_size is not None and not 0 < train_size < math.inf:
        raise ValueError(
            f"`train_size` must be positive and finite, got {train_size!r}. Leave it out to count what is in `data`."
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be positive and finite, got {scale!r}. 1 takes `data` for all there was.")


class _Totals:
    """Sums of squared gradients, fp32: in two stages, so that a sum of millions does not swallow the next one."""

    _STAGE = 1024

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = params
        self._recent = self._zeros()
        self._earlier: dict[str, Tensor] | None = None
        self._count = 0

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._params.items()}

    def add(self, weighted: list[tuple[float, Tensor]]) -> None:
        """Add the squared gradients of losses of one forward pass, each times its weight."""
        for i, (weight, loss) in enumerate(weighted):
            more = i + 1 < len(weighted)
            grads = torch.autograd.grad(loss, list(self._params.values()), retain_graph=more, allow_unused=True)
            for total, grad in zip(self._recent.values(), grads, strict=True):
                if grad is not None:
                    grad = grad.detach().float()
                    total.addcmul_(grad, grad, value=weight)
        self._count += 1
        if self._count % self._STAGE == 0:
            self._earlier, self._recent = self.sums(), self._zeros()

    def sums(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        if self._earlier is None:
            return self._recent
        return {name: self._earlier[name] + recent for name, recent in self._recent.items()}


def single_examples(
    data: Iterable[Mapping[str, Any]], device: torch.device
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Yield examples as batches of one, without what pads them.

    Args:
        data: Batches, each a mapping of the model's arguments.
        device: Where they go.

    Yields:
        The model's arguments for one example, and its labels if there are some.

    Raises:
        ValueError: If a batch holds no tensors beside labels.
    """
    for batch in data:
        # Tensors without dimensions, such as a count, are of no example.
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
        labels = tensors.pop("labels", None)
        if not tensors:
            raise ValueError("Each batch must hold tensors of the model's arguments, got none. Check the data.")
        for i in range(len(next(iter(tensors.values())))):
            one = {k: v[i : i + 1] for k, v in tensors.items()}
            target = None if labels is None else labels[i : i + 1]
            mask = one.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not mask.bool().all():
                kept = mask[0].bool()
                if not kept.any():  # a row that fills up a batch
                    continue
                one = {k: v[:, kept] if v.dim() > 1 and v.shape[1] == len(kept) else v for k, v in one.items()}
                if target is not None and target.dim() == 2 and target.shape[1] == len(kept):
                    target = target[:, kept]
            yield one, target


def _losses(
    model: nn.Module, logits: Tensor, labels: Tensor | None, estimator: str, generator: torch.Generator
) -> tuple[list[tuple[float, Tensor]], int, bool]:
    """Return weighted losses of an example, their units, and whether these are tokens."""
    # The losses' squared gradients, times the weights, are the curvature; on average, where labels are drawn.
    if logits.dim() == 3:
        return *_of_tokens(model, logits.float(), labels, estimator, generator), True
    if logits.dim() > 3:
        raise ValueError(
            f"`model` must give logits of shape (batch, classes) or (batch, tokens, classes), got "
            f"{tuple(logits.shape)}. Other models are not supported."
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    outputs = logits.float().reshape(-1)
    if problem is None and len(outputs) > 1 and labels is not None and labels.is_floating_point():
        raise ValueError(
            f"`model.config.problem_type` must be set where `labels` are no classes, got None for {labels.dtype}. Set "
            f"it to 'multi_label_classification' or 'regression'."
        )
    return _of_outputs(outputs, problem, estimator, generator), 1, False


def _of_tokens(
    model: nn.Module, logits: Tensor, labels: Tensor | None, estimator: str, generator: torch.Generator
) -> tuple[list[tuple[float, Tensor]], int]:
    """Return the losses of a sequence, and the number of tokens that count."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"`model` must be a causal language model or classify tokens, got {type(model).__name__}, which has an "
            f"encoder and a decoder. Its curvature cannot be estimated yet."
        )
    if estimator == "ggn":
        raise ValueError(
            "`estimator` must be 'squared-gradient' for a language model or a classifier of tokens, got 'ggn'. Pass "
            "that."
        )
    predicts_next = is_language_model(model)
    if labels is None and predicts_next:
        labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    if labels is None or labels.shape != logits.shape[:2]:
        got = "none" if labels is None else tuple(labels.shape)
        raise ValueError(
            f"`labels` must be one per token, of shape {tuple(logits.shape[:2])}, got {got}. They say which tokens "
            f"count: label the others {_IGNORED}."
        )
    logits, labels = (logits[0, :-1], labels[0, 1:]) if predicts_next else (logits[0], labels[0])
    counts = labels.cpu() != _IGNORED
    if not counts.any():
        return [], 0
    drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
    drawn = torch.where(counts, drawn, torch.full_like(drawn, _IGNORED)).to(logits.device)
    return [(1.0, nn.functional.cross_entropy(logits, drawn, reduction="sum"))], int(counts.sum())


def _of_outputs(
    outputs: Tensor, problem: str | None, estimator: str, generator: torch.Generator
) -> list[tuple[float, Tensor]]:
    """Return the losses of an example of a classifier or a regression, whose outputs are (classes,)."""
    known = outputs.detach().cpu()
    if problem == "multi_label_classification":
        # Each output is the logit of a yes or no of its own; the second derivative by it is p (1 - p).
        p = known.sigmoid()
        if estimator == "ggn":
            return [(float(q * (1 - q)), output) for q, output in zip(p, outputs, strict=True)]
        residual = p - torch.bernoulli(p, generator=generator)
    elif problem == "regression" or len(outputs) == 1:
        # Gaussians of unit variance: the gradient of the log-probability is the residual times that of the output.
        if estimator == "ggn":
            return [(1.0, output) for output in outputs]
        residual = torch.randn(known.shape, generator=generator)
    else:
        losses, probabilities = -outputs.log_softmax(-1), known.softmax(-1)
        if estimator == "ggn":
            return [(float(p), losses[c]) for c, p in enumerate(probabilities)]
        return [(1.0, losses[int(torch.multinomial(probabilities, 1, generator=generator))])]
    return [(1.0, outputs @ residual.to(outputs.device))]
