"""The passes over memory of a training step: sample, take what the gradient says of the curvature, update.

Each is written once, on flat tensors of one length, in place. `hf_ivon.execution` runs it piece by piece, over packs
of small tensors, or compiled; `passes.cpp` has the same for CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ivon import functional
from hf_ivon.philox import normal_lanes


class UpdateOptions(NamedTuple):
    """The options of `update` for one tensor, in its order; see there."""

    ess: float
    weight_decay: float
    beta1: float
    beta2: float
    debias: float
    clip_radius: float
    lr: float
    divisor: float
    price: bool
    average: bool


# The tensors of `update`, in its order; see there.
UpdateTensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


class NoiseOptions(NamedTuple):
    """The options of `subtract_noise_lanes`, in its order; see there."""

    ess: float
    weight_decay: float
    beta2: float
    factor: float | Tensor
    first: bool


def sample_lanes(
    thetas: Sequence[Tensor],
    means: Sequence[Tensor],
    hesses: Sequence[Tensor],
    columns: Tensor,
    words: Tensor,
    ess: float,
    weight_decay: float,
    keep: bool = True,
) -> None:
    """Keep the mean and put a weight sample in its place.

    Args:
        thetas: The four lanes of a tensor that holds its mean, or the same range of columns of each: 1-D, the last
            ones shorter, or missing, if the tensor's size is no multiple of four. Written to.
        means: Where the mean goes; shapes of `thetas`. Written to, if `keep` says so.
        hesses: Hessian estimates, shapes of `thetas`.
        columns: Column numbers of the range, int64, (W,).
        words: What the noise is a function of, see `hf_ivon.philox.normal_lanes`.
        ess: λ, number of examples.
        weight_decay: δ, loss/param².
        keep: Copy what `thetas` hold into `means`; else it is there, and `thetas` may be of a narrower dtype.
    """
    samples = []  # all before the first is written: a lack of memory must not leave some of the lanes
    for theta, mean, hess, eps in zip(thetas, means, hesses, normal_lanes(columns, words), strict=False):
        if keep:
            mean.copy_(theta)
        if eps.shape != theta.shape:
            eps = eps[: theta.shape[0]]
        samples.append(functional.sample(mean, hess, eps, ess=ess, weight_decay=weight_decay))
    for theta, drawn in zip(thetas, samples, strict=True):
        theta.copy_(drawn)


def draw_lanes(lanes: Sequence[Tensor], columns: Tensor, indices: Tensor, words: Tensor) -> None:
    """Write the noise of several tensors, which have their columns one after another.

    Args:
        lanes: Where the four draws of each column go, four tensors of shape (W,). Written to.
        columns: Column numbers, each in its tensor, int64, (W,).
        indices: Number of each column's tensor, int64, (W,).
        words: What the noise is a function of; the index in it is not used.
    """
    for lane, draws in zip(
        lanes, normal_lanes(columns, (words[0], words[1], indices, words[3], words[4])), strict=True
    ):
        lane.copy_(draws)


def adopt(theta: Tensor, mean: Tensor) -> None:
    """Let a mean follow what others wrote to its weights in a narrower dtype, such as loaded ones.

    Args:
        theta: The weights, holding the mean but for what was written.
        mean: The mean, shape of `theta`; elements that round to their weights stay as they are. Written to.
    """
    # As integers: compilers compare numbers in fp32, and leave the rounding out.
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[theta.element_size()]
    same = theta.view(kind) == mean.to(theta.dtype).view(kind)
    mean.copy_(torch.where(same, mean, theta.to(mean.dtype)))


def take_product(theta: Tensor, mean: Tensor, grad: Tensor, factor: float, squared: bool) -> None:
    """Put the mean back and keep gradient times noise where it was: what the sample was for is then known.

    Args:
        theta: The weight sample; becomes the mean.
        mean: The mean; becomes ``grad * (theta - mean) * factor``, shape of `theta`.
        grad: Gradient at the sample, shape of `theta`.
        factor: Multiplies the gradient.
        squared: Keep ``(grad * factor) ** 2`` instead.
    """
    if squared:
        product = (grad * factor).square_()
    else:
        # The perturbation that was really applied: what rounding made of mean + noise, minus the mean.
        product = (theta - mean).mul_(grad).mul_(factor)
    theta.copy_(mean)
    mean.copy_(product)


def add_product(total: Tensor, theta: Tensor, mean: Tensor, grad: Tensor, factor: float | Tensor) -> None:
    """Add gradient times noise to that of earlier contexts.

    Args:
        total: Sum of products. Written to.
        theta: The weight sample, shape of `total`, in its dtype or a narrower one.
        mean: The mean, shape of `total`.
        grad: Gradient at the sample, shape of `total`.
        factor: Multiplies the gradient.
    """
    noise = theta.to(mean.dtype) - mean
    total.add_(noise.mul_(grad).mul_(factor))


def subtract_noise_lanes(
    thetas: Sequence[Tensor],
    hesses: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    columns: Tensor,
    words: Tensor,
    ess: float,
    weight_decay: float,
    beta2: float,
    factor: float | Tensor,
    first: bool,
) -> None:
    """Take the noise off a weight sample, and let the Hessian learn from gradient times noise.

    Args:
        thetas: Lanes of a tensor that holds a weight sample, as for `sample_lanes`. Written to.
        hesses: Hessian estimates that the sample was drawn with, shapes of `thetas`. Written to.
        grads: Gradients at the sample, shapes of `thetas`; None leaves the Hessian as it is.
        columns: Column numbers of the range, int64, (W,).
        words: What the noise is a function of, those of the sample.
        ess: λ, number of examples.
        weight_decay: δ, loss/param².
        beta2: Decay of the Hessian average.
        factor: Multiplies the gradient.
        first: Whether this is the first micro-batch of its step; the others add to its estimate.
    """
    noises, learned = [], []  # all before the first is written, as in `sample_lanes`
    for i, (hess, eps) in enumerate(zip(hesses, normal_lanes(columns, words), strict=False)):
        if eps.shape != hess.shape:
            eps = eps[: hess.shape[0]]
        noise = functional.perturbation(hess, eps, ess=ess, weight_decay=weight_decay)
        noises.append(noise)
        if grads is not None:
            product = (noise * grads[i]).mul_(factor)
            hess_hat = functional.hess_hat_price(product, hess, ess=ess, weight_decay=weight_decay)
            if not first:
                hess_hat.add_(hess)  # the decay of this step has been
            new = functional.update_hess(hess, hess_hat, beta2=beta2, weight_decay=weight_decay)
            # A gradient scaler skips a step whose gradients are not finite; the Hessian must not keep them.
            learned.append(torch.where(torch.isfinite(new), new, hess))
    for theta, noise in zip(thetas, noises, strict=True):
        theta.sub_(noise)
    for hess, new in zip(hesses, learned, strict=False):
        hess.copy_(new)


def square(total: Tensor, grad: Tensor, factor: float | Tensor, keep: bool) -> None:
    """Put squared gradients in the place of earlier ones, or add them.

    Args:
        total: Sum of squares. Written to.
        grad: Gradient, shape of `total`.
        factor: Multiplies the gradient.
        keep: Add to what is there.
    """
    squared = grad.to(total.dtype).mul(factor).square_()
    _ = total.add_(squared) if keep else total.copy_(squared)


def update(
    mean: Tensor,
    grad: Tensor,
    curvature: Tensor | None,
    momentum: Tensor,
    hess: Tensor,
    prior_mean: Tensor | None,
    ess: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    debias: float,
    clip_radius: float,
    lr: float,
    divisor: float,
    price: bool,
    average: bool,
) -> None:
    """Run lines 3 to 7 of Algorithm 1.

    No operation in it may branch on a number that a schedule changes, as `lerp` does on its weight: compiled, every
    step would be compiled anew.

    Args:
        mean: Posterior mean. Written to.
        grad: Gradient of the step, shape of `mean`, in its dtype or a narrower one.
        curvature: Sum of gradient times noise, or of Hessian estimates; shape of `mean`. None leaves the Hessian as it
            is: it has learned in the backward pass.
        momentum: Gradient average, shape of `mean`, in its dtype or bf16. Written to.
        hess: Hessian estimate, shape of `mean`. Written to.
        prior_mean: Prior mean, shape of `mean`; None is zero.
        ess: λ, number of examples.
        weight_decay: δ, loss/param².
        beta1: Decay of the gradient average.
        beta2: Decay of the Hessian average.
        debias: Divisor of the gradient average.
        clip_radius: ξ; inf is off.
        lr: Learning rate, with everything that multiplies it.
        divisor: What `curvature` is divided by.
        price: Whether `curvature` holds gradient times noise.
        average: Whether the Hessian is a plain average of its estimates.
    """
    average_grad = functional.update_momentum(momentum, grad.to(mean.dtype), beta1=beta1)
    momentum.copy_(average_grad)
    if curvature is not None:
        hess_hat = curvature * (1.0 / divisor)
        if price:
            hess_hat = functional.hess_hat_price(hess_hat, hess, ess=ess, weight_decay=weight_decay)
        if average:
            hess.copy_(functional.average_hess(hess, hess_hat, decay=beta2))
        else:
            hess.copy_(functional.update_hess(hess, hess_hat, beta2=beta2, weight_decay=weight_decay))
    direction = functional.newton_direction(
        mean,
        average_grad,
        hess,
        weight_decay=weight_decay,
        debias=debias,
        prior_mean=prior_mean,
        clip_radius=clip_radius,
    )
    mean.sub_(direction.mul_(lr))
