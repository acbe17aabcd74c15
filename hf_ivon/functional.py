r"""Algorithm 1 of IVON as pure tensor functions: no state, no framework.

Symbols of the paper and their names here: :math:`\lambda` = `ess`, :math:`\delta` = `weight_decay`,
:math:`h` = `hess`, :math:`\hat h` = `hess_hat`, :math:`g` = `momentum`, :math:`\hat g` = `grad_hat`,
:math:`m` = `mean`, :math:`\theta - m` = `noise`, :math:`\xi` = `clip_radius`, :math:`\alpha` = `lr`.

Source: Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024, arXiv:2402.17641.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# In exact arithmetic an update at most halves hess + weight_decay (see `update_hess`). In floating point a long run of
# halvings would round it to zero; these two floors, relative to weight_decay and absolute, keep the variance finite.
_RELATIVE_FLOOR = 2.0**-20
_ABSOLUTE_FLOOR = 1e-30


def posterior_variance(hess: Tensor, *, ess: float, weight_decay: float) -> Tensor:
    r"""Return the diagonal variance of q, :math:`\sigma^2 = 1/(\lambda (h + \delta))`.

    Args:
        hess: Diagonal Hessian estimate :math:`h`, any shape, loss/param² per example.
        ess: Effective sample size :math:`\lambda`, number of examples.
        weight_decay: Prior precision per example :math:`\delta`, loss/param².

    Returns:
        Variance, same shape and dtype as `hess`, param².

    Source:
        arXiv:2402.17641, Algorithm 1, line 8.

    Examples:
        >>> posterior_variance(torch.tensor([0.5, 1.5]), ess=4.0, weight_decay=0.5)
        tensor([0.2500, 0.1250])
    """
    return (hess + weight_decay).mul_(ess).reciprocal_()


def posterior_hess(variance: Tensor, *, ess: float, weight_decay: float) -> Tensor:
    r"""Return the Hessian that belongs to a variance, :math:`h = 1/(\lambda \sigma^2) - \delta`.

    Args:
        variance: Posterior variance :math:`\sigma^2`, any shape, param².
        ess: Effective sample size :math:`\lambda`, number of examples.
        weight_decay: Prior precision per example :math:`\delta`, loss/param².

    Returns:
        Diagonal Hessian estimate, same shape and dtype as `variance`, loss/param² per example.

    Source:
        arXiv:2402.17641, Algorithm 1, line 8, solved for h.

    Examples:
        >>> posterior_hess(torch.tensor([0.25, 0.125]), ess=4.0, weight_decay=0.5)
        tensor([0.5000, 1.5000])
    """
    return variance.reciprocal().div_(ess).sub_(weight_decay)


def sample(mean: Tensor, hess: Tensor, standard_normal: Tensor, *, ess: float, weight_decay: float) -> Tensor:
    r"""Return one draw of the weights, :math:`\theta = m + \sigma \epsilon`.

    Args:
        mean: Posterior mean :math:`m`, any shape.
        hess: Diagonal Hessian estimate :math:`h`, shape of `mean`.
        standard_normal: Draws :math:`\epsilon \sim N(0, 1)`, shape of `mean`.
        ess: Effective sample size :math:`\lambda`, number of examples.
        weight_decay: Prior precision per example :math:`\delta`, loss/param².

    Returns:
        A weight sample, shape of `mean`, in the wider of the dtypes of `mean` and `hess`.

    Source:
        arXiv:2402.17641, Algorithm 1, line 2 with the variance of line 8.

    Examples:
        >>> sample(torch.ones(1), torch.tensor([0.5]), torch.tensor([-2.0]), ess=4.0, weight_decay=0.5)
        tensor([0.])
    """
    return perturbation(hess, standard_normal, ess=ess, weight_decay=weight_decay).add_(mean)


def perturbation(hess: Tensor, standard_normal: Tensor, *, ess: float, weight_decay: float) -> Tensor:
    r"""Return by how much a draw of the weights is away from the mean, :math:`\sigma \epsilon`.

    Args:
        hess: Diagonal Hessian estimate :math:`h`, any shape.
        standard_normal: Draws :math:`\epsilon \sim N(0, 1)`, shape of `hess`.
        ess: Effective sample size :math:`\lambda`, number of examples.
        weight_decay: Prior precision per example :math:`\delta`, loss/param².

    Returns:
        The perturbation, shape of `hess`, param.

    Source:
        arXiv:2402.17641, Algorithm 1, line 2 with the variance of line 8.

    Examples:
        >>> perturbation(torch.tensor([0.5]), torch.tensor([-2.0]), ess=4.0, weight_decay=0.5)
        tensor([-1.])
    """
    return (hess + weight_decay).mul_(ess).rsqrt_().mul_(standard_normal)


def hess_hat_price(noise_grad: Tensor, hess: Tensor, *, ess: float, weight_decay: float) -> Tensor:
    r"""Return the reparameterization estimate, :math:`\hat h = \hat g (\theta - m)/\sigma^2`.

    Args:
        noise_grad: Average of gradient times noise :math:`\hat g (\theta - m)`, any shape, loss.
        hess: Hessian estimate :math:`h` that the noise was drawn with, shape of `noise_grad`.
        ess: Effective sample size :math:`\lambda`, number of examples.
        weight_decay: Prior precision per example :math:`\delta`, loss/param².

    Returns:
        Hessian estimate of this step, shape of `noise_grad`, loss/param²; it may be negative.

    Source:
        arXiv:2402.17641, Equation 3 and Algorithm 1, line 3.

    Examples:
        >>> hess_hat_price(torch.tensor([0.5]), torch.tensor([0.5]), ess=4.0, weight_decay=0.5)
        tensor([2.])
    """
    return (hess + weight_decay).mul_(ess).mul_(noise_grad)


def update_momentum(momentum: Tensor, grad_hat: Tensor, *, beta1: float) -> Tensor:
    r"""Return the running gradient average, :math:`g \leftarrow \beta_1 g + (1 - \beta_1) \hat g`.

    Args:
        momentum: Running average :math:`g`, any shape, loss/param.
        grad_hat: Gradient of this step :math:`\hat g`, shape of `momentum`.
        beta1: Decay :math:`\beta_1` in [0, 1).

    Returns:
        New running average, shape of `momentum`.

    Source:
        arXiv:2402.17641, Algorithm 1, line 4.

    Examples:
        >>> update_momentum(torch.tensor([1.0]), torch.tensor([2.0]), beta1=0.5)
        tensor([1.5000])
    """
    return (grad_hat - momentum).mul_(1.0 - beta1).add_(momentum)


def update_hess(hess: Tensor, hess_hat: Tensor, *, beta2: float, weight_decay: float) -> Tensor:
    r"""Return the next Hessian average; it keeps :math:`h + \delta` positive whatever :math:`\hat h` is.

    .. math:: h \leftarrow \beta_2 h + (1 - \beta_2) \hat h + \tfrac12 (1 - \beta_2)^2 (h - \hat h)^2 / (h + \delta)

    With :math:`u = h + \delta` and :math:`x = (1 - \beta_2)(\hat h - h)/u` the new value is
    :math:`u (1 + x + x^2/2) - \delta`, and :math:`1 + x + x^2/2 \ge 1/2`.

    Args:
        hess: Hessian estimate :math:`h`, any shape, with ``hess + weight_decay > 0``.
        hess_hat: Estimate of this step :math:`\hat h`, shape of `hess`, any sign.
        beta2: Decay :math:`\beta_2` in [0, 1).
        weight_decay: Prior precision per example :math:`\delta`, loss/param².

    Returns:
        New Hessian estimate, shape of `hess`.

    Source:
        arXiv:2402.17641, Equation 4 and Algorithm 1, line 5; positivity: Lin et al. 2020, Theorem 1.

    Examples:
        >>> update_hess(torch.tensor([1.0]), torch.tensor([3.0]), beta2=0.5, weight_decay=0.0)
        tensor([2.5000])
    """
    change = (hess_hat - hess).mul_(1.0 - beta2)
    ratio = (hess + weight_decay).reciprocal_().mul_(change)
    delta = _number(weight_decay, hess)
    floor = (delta * _RELATIVE_FLOOR).clamp_(min=_ABSOLUTE_FLOOR) - delta
    # h + change * (1 + ratio / 2): squares nothing, so that a large hess_hat overflows as late as it can.
    return ratio.mul_(0.5).add_(1.0).mul_(change).add_(hess).clamp_(min=floor)


def debiased_decay(beta2: float, *, step: float) -> float:
    r"""Return the decay of a debiased average, :math:`\beta_{2,t} = 1 - (1 - \beta_2)/(1 - \beta_2^{t + 1})`.

    With these decays, and the start value as the estimate of step 0, the average has the weights
    :math:`\beta_2^{t - i}` for the estimates 0 to t: it is the plain one in the first :math:`1 / (1 - \beta_2)` steps,
    and the start value counts as one estimate, no more.

    Args:
        beta2: Decay :math:`\beta_2` in [0, 1).
        step: Number of this step :math:`t`, from 1.

    Returns:
        Decay in [0, 1).

    Examples:
        >>> debiased_decay(0.5, step=1)
        0.33333333333333337
    """
    return 1.0 - (1.0 - beta2) / (1.0 - beta2 ** (step + 1.0))


def average_hess(hess: Tensor, hess_hat: Tensor, *, decay: float) -> Tensor:
    r"""Return the next average of estimates that are not negative, :math:`h \leftarrow \beta h + (1 - \beta) \hat h`.

    It is for the Fisher estimate :math:`\hat h = B \hat g^2`. Near the end of training the gradients :math:`g_i` of
    single examples have mean zero, so that the gradient :math:`\hat g` of a batch of :math:`B` has the variance
    :math:`h / B`, with :math:`h` the average of :math:`g_i^2`: the diagonal Fisher information. The estimate scatters
    by about :math:`\sqrt 2` times its mean, however narrow the noise of the weights is.

    Args:
        hess: Hessian estimate :math:`h`, any shape.
        hess_hat: Estimate of this step :math:`\hat h`, shape of `hess`, at least 0.
        decay: Decay of the average in [0, 1), see `debiased_decay`.

    Returns:
        New Hessian estimate, shape of `hess`, at least 1e-30: without a prior the variance must stay finite.

    Source:
        arXiv:2402.17641, Appendix B.2 (squared gradients), times the batch size, and without the term of Equation 4
        that keeps other estimates positive.

    Examples:
        >>> average_hess(torch.tensor([1.0]), torch.tensor([4.0]), decay=0.5)
        tensor([2.5000])
    """
    return (hess_hat - hess).mul_(1.0 - decay).add_(hess).clamp_min_(_ABSOLUTE_FLOOR)


def newton_direction(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    *,
    weight_decay: float,
    debias: float = 1.0,
    prior_mean: Tensor | None = None,
    clip_radius: float = math.inf,
) -> Tensor:
    r"""Return the step direction of the mean before the learning rate.

    .. math:: \mathrm{clip}\big((g/(1 - \beta_1^t) + \delta (m - m_0))/(h + \delta),\ \pm\xi\big)

    Args:
        mean: Posterior mean :math:`m`, any shape.
        momentum: Running gradient average :math:`g`, shape of `mean`.
        hess: Hessian estimate :math:`h` after this step's update, shape of `mean`.
        weight_decay: Prior precision per example :math:`\delta`, loss/param².
        debias: The divisor :math:`1 - \beta_1^t`; 1 turns debiasing off.
        prior_mean: Prior mean :math:`m_0`, shape of `mean`; None is the zero of Algorithm 1.
        clip_radius: Element-wise bound :math:`\xi` of the direction, param; inf is off.

    Returns:
        Direction to subtract after multiplication by the learning rate, shape of `mean`, param.

    Source:
        arXiv:2402.17641, Algorithm 1, lines 6 and 7, Section 3 trick 4; prior mean: Appendix A, "Weight decay".

    Examples:
        >>> newton_direction(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.5]), weight_decay=0.5)
        tensor([1.5000])
    """
    displacement = mean if prior_mean is None else mean - prior_mean
    direction = (momentum * (1.0 / debias)).add_(displacement * weight_decay).div_(hess + weight_decay)
    bound = _number(clip_radius, direction)
    return direction.clamp_(-bound, bound)


def _number(value: float, like: Tensor) -> Tensor:
    """Return a number as a tensor: as a bound of `clamp` a number is part of the compiled code, one code for each."""
    return torch.ones((), dtype=like.dtype, device=like.device) * value


def cache_sized(*tensors: Tensor, max_elements: int = 2**17) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in matching flat pieces that stay in the processor's cache.

    The temporaries of the functions above are then cache-sized too. On an accelerator, where a call costs more
    beside what it does, pieces are 32 times as large: small beside the model. A tensor that is not contiguous is
    one piece.

    Args:
        tensors: Tensors of one shape, on one device.
        max_elements: Most elements in a piece on a CPU.

    Yields:
        One tuple of views a piece, in the order of `tensors`; writing to them writes to the tensors.

    Examples:
        >>> [piece.tolist() for (piece,) in cache_sized(torch.tensor([[0, 1], [2, 3]]), max_elements=3)]
        [[0, 1, 2], [3]]
    """
    first = tensors[0]
    if first.device.type != "cpu":
        max_elements *= 32
    if first.numel() <= max_elements or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, first.numel(), max_elements):
        yield tuple(t[start : start + max_elements] for t in flat)
