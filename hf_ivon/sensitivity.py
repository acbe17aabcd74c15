r"""How a model depends on each of its training examples, and how good it would be without them.

This is the memory-perturbation equation. A Newton step that takes example i's loss :math:`\ell_i` back moves the mean
to :math:`m + \Sigma \nabla \ell_i(m)`, with :math:`\Sigma` the covariance at temperature one,
:math:`\sigma^2_N = 1 / (N (h + \delta))`. To first order its outputs :math:`f_i` move by :math:`V_i e_i`, prediction
variance times prediction error. The loss at these outputs estimates what leaving the example out of training gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_ivon.data import is_language_model
from hf_ivon.example_gradients import single_examples
from hf_ivon.mean import posterior_keys, unwrap
from hf_ivon.predict import evaluation_mode, logits_of, shown

if TYPE_CHECKING:
    from collections.abc import Generator

    from hf_ivon.posterior import Posterior

_IGNORED = -100


@dataclass(frozen=True)
class Sensitivity:
    r"""What a model owes to each of N training examples; tensors on the CPU, fp64.

    Args:
        score: Sensitivity to each example, (N,), at least 0: the sum over its outputs of the size of their change
            (:math:`\ell_1`-norm) if it is left out. For tokens, the change of the example's loss, nats.
        loss: Loss at the mean, (N,): nats, or squared error; for tokens, their sum.
        loo_loss: The same if the example is left out, (N,).
        num_tokens: What each loss is a sum of, (N,): label tokens; None where it is one per example.
        outputs: Logits, or the regression's value, at the mean, (N, C); None for tokens.
        change: What is added to them if the example is left out, (N, C); None for tokens.
        variance: Their variance under the posterior at temperature one, (N, C); None for tokens.
        labels: Labels, (N,); None for tokens.
    """

    score: Tensor
    loss: Tensor
    loo_loss: Tensor
    num_tokens: Tensor | None = None
    outputs: Tensor | None = None
    change: Tensor | None = None
    variance: Tensor | None = None
    labels: Tensor | None = None

    def summary(self) -> dict[str, float]:
        """Return the average loss at the mean, and its leave-one-out estimate; of a classifier also the accuracies."""
        count = float(len(self.loss) if self.num_tokens is None else self.num_tokens.sum())
        found = {"loss": float(self.loss.sum()) / count, "loo_loss": float(self.loo_loss.sum()) / count}
        if self.outputs is not None and self.change is not None and self.outputs.shape[1] > 1:
            right = [(f.argmax(dim=1) == self.labels).double() for f in (self.outputs, self.outputs + self.change)]
            found |= {"accuracy": float(right[0].mean()), "loo_accuracy": float(right[1].mean())}
        return found


def estimate_sensitivity(
    model: nn.Module,
    posterior: Posterior,
    data: Iterable[Mapping[str, Any]],
    *,
    ess_scale: float = 1.0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Sensitivity:
    r"""Estimate how a trained model would change without each of its training examples, without training again.

    It takes one backward pass per example and one more per class: :math:`V_i e_i` is
    :math:`\nabla f_i^\top \Sigma \nabla \ell_i`, and no matrix is formed. The variances are taken at temperature one
    (times λ/N), since it is the loss of N examples that one is taken out of; that is so whatever λ was trained with.
    Of a model that classifies tokens or predicts the next one, the examples are whole sequences, and their loss is
    followed to first order, :math:`\ell_i + \nabla \ell_i^\top \Sigma \nabla \ell_i`.

    Args:
        model: A classifier with logits (batch, classes), a regression with (batch, 1), or a model of tokens with
            (batch, tokens, classes). Its weights are the posterior's mean.
        posterior: The posterior that belongs to the model.
        data: Batches of training examples, or of a part of them: mappings of the model's arguments, with `labels`.
        ess_scale: Factor on the precision at temperature one, > 0. All changes are divided by it; the order of the
            scores is not touched. A diagonal posterior that was trained at a low temperature is too wide at one, and
            the estimated losses are then far too high: a factor of 20 was right for the finetuning preset.
        device: Where the batches go; None is the device of the model's first parameter.
        progress: Show a bar.

    Returns:
        One value per example, in the order of the data.

    Raises:
        ValueError: If the posterior does not belong to the model or knows no number of examples, if the data is empty
            or without labels, or if `ess_scale` is not positive.

    Source:
        arXiv:2402.17641, Section 4.4 and Appendix C.6; Nickl et al., "The Memory Perturbation Equation", NeurIPS 2023.
    """
    bare = unwrap(model)
    if getattr(getattr(bare, "config", None), "problem_type", None) == "multi_label_classification":
        raise ValueError(
            "`model` must choose one class, got a multi-label classifier. Estimate one classifier for each label."
        )
    params = posterior_keys(model)
    posterior.check_mean(params, ess_scale)
    params = {name: params[name] for name in posterior.names()}
    device = next(iter(params.values())).device if device is None else torch.device(device)
    variance = [
        posterior.variance[name].to(device) * (posterior.config.of("ess", name) / _size(posterior) / ess_scale)
        for name in posterior.names()
    ]
    weights = _Weights(list(params.values()), variance)
    rows: list[dict[str, Any]] = []
    with evaluation_mode(model), torch.enable_grad(), _all_trainable(list(params.values())):
        for inputs, labels in shown(single_examples(data, device), "sensitivity", progress, "example"):
            if labels is None:
                raise ValueError("Each batch of `data` must have `labels`, got none. They are what the model learnt.")
            logits = logits_of(bare, inputs).float()
            if logits.ndim == 3:
                rows.append(_of_tokens(logits[0], labels[0], weights, shifted=is_language_model(bare)))
            else:
                rows.append(_of_outputs(logits.reshape(-1), labels.reshape(-1), weights))
    return _stack(rows)


def _size(posterior: Posterior) -> float:
    """Return what the training loss averaged over; a `ValueError` if that is not known."""
    size = posterior.config.loss_size
    if not size:
        raise ValueError(
            "The posterior must say how many examples it was trained on, got none. Train with hf_ivon's Trainer, or "
            "set `num_examples` in posterior_config.json."
        )
    return float(size)


@contextmanager
def _all_trainable(params: list[nn.Parameter]) -> Generator[None, None, None]:
    """Let gradients of parameters be asked for, also of frozen ones; on exit each is as it was."""
    frozen = [p for p in params if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


class _Weights:
    """The weights that the outputs of one example are differentiated by, and their variances."""

    def __init__(self, params: list[nn.Parameter], variance: list[Tensor]) -> None:
        self._params, self._variance = params, variance

    def gradient(self, output: Tensor, *, last: bool) -> list[Tensor | None]:
        """Return the gradient of a number; `last` lets go of its graph."""
        return list(torch.autograd.grad(output, self._params, retain_graph=not last, allow_unused=True))

    def spread(self, gradient: list[Tensor | None]) -> list[Tensor | None]:
        """Return a gradient times the variances: where the mean moves if what it is of is taken back."""
        return [None if g is None else g.float() * v for g, v in zip(gradient, self._variance, strict=True)]

    @staticmethod
    def product(first: list[Tensor | None], second: list[Tensor | None]) -> float:
        """Return the inner product of two gradients."""
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        return sum(float(torch.dot(a.reshape(-1).float(), b.reshape(-1).float())) for a, b in pairs)


def _of_outputs(outputs: Tensor, labels: Tensor, weights: _Weights) -> dict[str, Any]:
    """Return what is known of an example of a classifier or a regression."""
    known = outputs.detach().cpu().double()  # there are devices without fp64
    label = labels.cpu().double() if len(outputs) == 1 else labels.cpu()
    if label.numel() != 1 or (len(outputs) > 1 and not 0 <= int(label) < len(outputs)):
        raise ValueError(
            f"`labels` must be one class of {len(outputs)} per example, got {labels.tolist()}. Check the data."
        )
    if len(outputs) == 1:
        error = 2.0 * (known - label)  # of the squared error, as Transformers' regressions are trained
    else:
        error = known.softmax(0)
        error[int(label)] -= 1.0
    step = weights.spread(weights.gradient(outputs @ error.to(outputs.dtype).to(outputs.device), last=False))
    change, variance = [], []
    for i in range(len(outputs)):
        row = weights.gradient(outputs[i], last=i + 1 == len(outputs))
        change.append(weights.product(row, step))
        variance.append(weights.product(row, weights.spread(row)))
    changed = known + torch.tensor(change, dtype=torch.float64)
    return {
        "score": sum(map(abs, change)),
        "loss": _loss(known, label),
        "loo_loss": _loss(changed, label),
        "outputs": known.tolist(),
        "change": change,
        "variance": variance,
        "labels": label.item(),
    }


def _loss(outputs: Tensor, label: Tensor) -> float:
    if len(outputs) == 1:
        return float((outputs - label).square())
    return float(-outputs.log_softmax(0)[int(label)])


def _of_tokens(logits: Tensor, labels: Tensor, weights: _Weights, *, shifted: bool) -> dict[str, Any]:
    """Return what is known of a sequence."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(
            f"`labels` must be one per token, of shape {tuple(logits.shape[:1])}, got {tuple(labels.shape)}. Label "
            f"tokens that do not count {_IGNORED}."
        )
    if shifted:
        logits, labels = logits[:-1], labels[1:]
    counted = int((labels != _IGNORED).sum())
    if not counted:
        return {"score": 0.0, "loss": 0.0, "loo_loss": 0.0, "num_tokens": 0}
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=_IGNORED)
    gradient = weights.gradient(loss, last=True)
    change = weights.product(gradient, weights.spread(gradient))
    return {"score": change, "loss": float(loss), "loo_loss": float(loss) + change, "num_tokens": counted}


def _stack(rows: list[dict[str, Any]]) -> Sensitivity:
    if not any(row.get("num_tokens", 1) for row in rows):
        raise ValueError("`data` must have at least one example with a label, got none. Check the split.")
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return Sensitivity(**columns)
