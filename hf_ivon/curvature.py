"""Diagonal Hessians for models that were trained some other way: squared gradients, one example at a time.

The result is a posterior like IVON's, so that such models can be merged, sampled and inspected too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ivon import functional
from hf_ivon.data import is_language_model
from hf_ivon.example_gradients import SquaredGradients, alike, single_examples
from hf_ivon.mean import mean_digest, posterior_keys, unwrap
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig, library_versions
from hf_ivon.predict import evaluation_mode

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
    totals, directions = SquaredGradients(bare, params), _Directions(bare, estimator, seed)
    with evaluation_mode(model), torch.enable_grad():
        one_by_one = single_examples(data, next(iter(params.values())).device)
        for inputs, labels in alike(one_by_one, totals.together):
            totals.add(inputs, functools.partial(directions.of, labels=labels))
    if not directions.units:
        raise ValueError("`data` must hold examples that count, got none. Check the split, and its labels.")
    hess = {name: total.float().cpu().div_(directions.units) for name, total in totals.sums().items()}
    size = train_size or max(1, round(directions.units * scale))
    average = sum(float(h.double().sum()) for h in hess.values()) / sum(h.numel() for h in hess.values())
    config = PosteriorConfig(
        ess=float(size),
        weight_decay=weight_decay,
        hess_init=max(average, 1e-30),
        num_examples=max(1, round(directions.examples * scale)) if directions.of_tokens else size,
        num_tokens=size if directions.of_tokens else None,
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


class _Directions:
    """What to differentiate a model's logits along: the squared gradients, added up, are the curvature.

    With one label drawn from the model for each example or token they are so on average.
    """

    def __init__(self, model: nn.Module, estimator: str, seed: int) -> None:
        self._model, self._estimator = model, estimator
        self._generator = torch.Generator().manual_seed(seed)
        self.examples, self.units, self.of_tokens = 0, 0, False

    def of(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the directions of a batch, (directions, *logits), and count what it has.

        Raises:
            ValueError: If the logits or the labels are not of a kind that is known.
        """
        self.examples += len(logits)
        if logits.dim() == 3:
            self.of_tokens = True
            along, counted = _of_tokens(self._model, logits.float(), labels, self._estimator, self._generator)
            self.units += counted
            return along
        if logits.dim() > 3:
            raise ValueError(
                f"`model` must give logits of shape (batch, classes) or (batch, tokens, classes), got "
                f"{tuple(logits.shape)}. Other models are not supported."
            )
        problem = getattr(getattr(self._model, "config", None), "problem_type", None)
        outputs = logits.float().reshape(len(logits), -1)
        if problem is None and outputs.shape[1] > 1 and labels is not None and labels.is_floating_point():
            raise ValueError(
                f"`model.config.problem_type` must be set where `labels` are no classes, got None for {labels.dtype}. "
                f"Set it to 'multi_label_classification' or 'regression'."
            )
        self.units += len(logits)
        along = _of_outputs(outputs.cpu(), problem, self._estimator, self._generator)
        return along.to(logits.device).reshape(-1, *logits.shape)


def _of_tokens(
    model: nn.Module, logits: Tensor, labels: Tensor | None, estimator: str, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return the direction of sequences, (1, batch, tokens, classes), and the number of tokens that count."""
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
    along = torch.zeros_like(logits)
    of_tokens = along[:, :-1] if predicts_next else along
    labels = (labels[:, 1:] if predicts_next else labels).to(logits.device)
    probabilities = (logits[:, :-1] if predicts_next else logits).softmax(-1)
    counts = labels != _IGNORED
    drawn = torch.multinomial(probabilities.flatten(0, 1).cpu(), 1, generator=generator).to(logits.device)
    residual = probabilities.scatter_add(-1, drawn.view(*labels.shape, 1), -torch.ones_like(probabilities[..., :1]))
    of_tokens.copy_(residual * counts[..., None])
    return along[None], int(counts.sum())


def _of_outputs(outputs: Tensor, problem: str | None, estimator: str, generator: torch.Generator) -> Tensor:
    """Return the directions, (directions, batch, outputs), of a classifier's or a regression's outputs."""
    each = torch.eye(outputs.shape[1])[:, None].expand(-1, len(outputs), -1)
    if problem == "multi_label_classification":
        # Each output is the logit of a yes or no of its own; the second derivative by it is p (1 - p).
        p = outputs.sigmoid()
        if estimator == "ggn":
            return each * (p * (1 - p)).sqrt()
        return (p - torch.bernoulli(p, generator=generator))[None]
    if problem == "regression" or outputs.shape[1] == 1:
        # Gaussians of unit variance: the gradient of the log-probability is the residual times that of the output.
        return each if estimator == "ggn" else torch.randn(outputs.shape, generator=generator)[None]
    p = outputs.softmax(-1)
    if estimator == "ggn":
        return p.T[..., None].sqrt() * (p - each)
    drawn = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add(1, drawn, -torch.ones_like(p[:, :1]))[None]
