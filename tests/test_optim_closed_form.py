"""IVON against answers known in closed form: a linear-Gaussian posterior, and the curvature of a quadratic."""

import pytest
import torch
from torch import nn

from hf_ivon import Posterior, functional
from hf_ivon.optim import IVON


def test_linear_regression_reaches_the_mean_field_optimum():
    """The whole point: mean and variance must be those of the best diagonal Gaussian, 1/diag(posterior precision)."""
    torch.manual_seed(1)
    n, d, noise_variance, prior_precision = 400, 4, 0.25, 8.0
    scales = torch.tensor([0.7, 1.0, 1.4, 1.2], dtype=torch.float64)
    x = torch.randn(n, d, dtype=torch.float64) + 0.7 * torch.randn(n, 1, dtype=torch.float64)  # correlated inputs
    x = x * scales
    y = x @ torch.randn(d, dtype=torch.float64) + noise_variance**0.5 * torch.randn(n, dtype=torch.float64)
    precision = x.T @ x / noise_variance + prior_precision * torch.eye(d, dtype=torch.float64)
    exact_mean = torch.linalg.solve(precision, x.T @ y / noise_variance)
    exact_variance = 1.0 / precision.diag()

    # Far from the optimum the gradient is noise in hess_hat; this is about the stationary point, so it starts near.
    p = nn.Parameter(exact_mean + exact_variance.sqrt())
    # The loss is the mean negative log-likelihood, so that ess is N, and the prior precision is ess * weight_decay.
    optimizer = IVON([p], lr=1.0, ess=n, hess_init=2.0, beta1=0.9, weight_decay=prior_precision / n, rescale_lr=False)
    steps, tail = 5000, 3000
    means = []
    for t in range(steps):
        # 1 - beta2 shrinks like 1/t, which makes hess the running average of hess_hat.
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.param_groups[0]["beta2"] = 1.0 - 1.0 / (t + 50)
        with optimizer.sampled_params(train=True):
            (0.5 * (x @ p - y).square().mean() / noise_variance).backward()
        optimizer.step()
        optimizer.zero_grad()
        if t >= steps - tail:
            means.append(p.detach().clone())
    # One hess_hat has a relative standard deviation of sqrt(2 + off-diagonal terms), below 1.8 here; the average of
    # 5,000 of them 2.5%, so 12% is 5 standard errors. The iterates stray sqrt(lr / 2) = 0.16 sigma from the exact mean
    # and forget in about 1 / lr = 20 steps (the correlated direction in 100): the average of 3,000 of them is off by
    # about 0.03 sigma, and 0.2 sigma is more than 5 standard errors.
    variance = optimizer.posterior_variance(p)
    assert ((variance / exact_variance - 1).abs() < 0.12).all(), (variance, exact_variance)
    mean = torch.stack(means).mean(0)
    assert ((mean - exact_mean).abs() < 0.2 * exact_variance.sqrt()).all(), (mean, exact_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hess_hat_is_unbiased_on_a_quadratic(dtype):
    """Equation 3 must average to the true diagonal, off-diagonal curvature notwithstanding."""
    draws, ess, hess_init = 8_000, 50.0, 1.0
    root = torch.randn(3, 3, dtype=dtype)
    curvature = root @ root.T
    p = nn.Parameter(torch.randn(3, dtype=dtype))
    optimizer = IVON([p], lr=0.0, ess=ess, hess_init=hess_init, weight_decay=0.0, beta2=0.0)
    estimates = []
    for _ in range(draws):
        with optimizer.sampled_params(train=True):
            (0.5 * p @ curvature @ p).backward()
        product = optimizer._capture.products.curvature(p)
        hess = torch.full_like(p, hess_init)
        estimates.append(functional.hess_hat_price(product.clone(), hess, ess=ess, weight_decay=0.0))
        optimizer.zero_grad()
    estimates = torch.stack(estimates).double()
    standard_error = estimates.std(0) / draws**0.5
    assert ((estimates.mean(0) - curvature.diag().double()).abs() < 5 * standard_error).all()


def test_noise_has_the_variance_that_the_state_says():
    """sigma^2 = 1 / (ess (hess + weight_decay)), element by element, also after hess has moved."""
    n = 100_000
    p = nn.Parameter(torch.zeros(2, n))
    optimizer = IVON([p], lr=0.0, ess=40.0, hess_init=1.0, weight_decay=0.25)
    with optimizer.sampled_params():
        pass
    optimizer.state[p]["hess"][1] = 4.0
    with optimizer.sampled_params(train=True):
        variance = p.detach().var(1)
        mean = p.detach().mean(1)
    expected = torch.tensor([1 / (40 * 1.25), 1 / (40 * 4.25)])
    # The relative standard error of a variance of n normals is sqrt(2/n) = 0.45%.
    assert ((variance / expected - 1).abs() < 5 * (2 / n) ** 0.5).all()
    assert (mean.abs() < 5 * (expected / n).sqrt()).all()


@pytest.mark.parametrize("fused", [False, True])
def test_predictions_and_what_is_saved_are_as_wide_as_asked(fused):
    """A posterior that is wider than the noise of training must be so in every sample, with the same Hessian."""
    model = nn.ModuleDict({"small": nn.Linear(3, 2), "large": nn.Linear(512, 512)})
    for p in model.parameters():
        nn.init.zeros_(p)  # so that a parameter is its own noise
    options = {"lr": 0.0, "ess": 40.0, "weight_decay": 0.25, "seed": 1, "fused": fused}
    deviations = []
    for scale in (1.0, 0.25):
        optimizer = IVON(model.parameters(), **options, eval_ess_scale=scale)
        found = {}
        for train in (True, False):
            with optimizer.sampled_params(train=train):
                found[train] = nn.utils.parameters_to_vector(model.parameters()).clone()
        deviations.append(found)
    assert torch.equal(deviations[1][True], deviations[0][True])
    assert torch.equal(deviations[1][False], 2 * deviations[0][False])

    posterior = Posterior.from_optimizer(optimizer, model, num_examples=40)
    assert posterior.config.ess == 10.0
    for name, p in model.named_parameters():
        torch.testing.assert_close(posterior.hess(name), optimizer.state[p]["hess"])

    state = optimizer.state_dict()
    del state["param_groups"][0]["eval_ess_scale"]  # saved before there was such an option
    optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.posterior_variance(p), torch.full_like(p, 1 / (40 * 1.25)))
