"""The pure functions: positivity of the precision, and pieces that stay in the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ivon import functional

sizes = st.floats(min_value=-15, max_value=12).map(lambda e: 10.0**e)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    hess_init=sizes,
    weight_decay=st.one_of(st.just(0.0), sizes),
    beta2=st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.99999]),
    hats=st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), sizes), min_size=1, max_size=40),
)
def test_precision_stays_positive_whatever_hess_hat_is(hess_init, weight_decay, beta2, hats):
    """A variance that is negative, infinite or NaN for one weight destroys the model at the next sample."""
    hess = torch.tensor([hess_init])
    for sign, size in hats:
        hess = functional.update_hess(hess, torch.tensor([sign * size]), beta2=beta2, weight_decay=weight_decay)
        assert (hess + weight_decay > 0).all()
        assert torch.isfinite(hess).all()
        variance = functional.posterior_variance(hess, ess=1.0, weight_decay=weight_decay)
        assert (variance > 0).all()
        assert torch.isfinite(variance).all()


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 1.0])
def test_precision_survives_the_worst_sequence(weight_decay):
    """The hess_hat that halves hess + weight_decay at every step rounds it to zero in some hundred steps."""
    hess, beta2 = torch.tensor([1.0]), 0.9
    for _ in range(1000):
        worst = hess - (hess + weight_decay) / (1 - beta2)
        hess = functional.update_hess(hess, worst, beta2=beta2, weight_decay=weight_decay)
        assert (hess + weight_decay > 0).all()
    assert torch.isfinite(functional.posterior_variance(hess, ess=1.0, weight_decay=weight_decay)).all()


def test_update_hess_is_the_papers_formula():
    """The rearranged update must equal Equation 4 as printed."""
    hess, hat = torch.rand(100, dtype=torch.float64) + 0.1, torch.randn(100, dtype=torch.float64) * 10
    beta2, delta = 0.97, 0.3
    printed = beta2 * hess + (1 - beta2) * hat + 0.5 * (1 - beta2) ** 2 * (hess - hat) ** 2 / (hess + delta)
    torch.testing.assert_close(functional.update_hess(hess, hat, beta2=beta2, weight_decay=delta), printed)


def test_posterior_hess_inverts_posterior_variance():
    """Files hold variances; the Hessian that merging needs must come back from them."""
    hess = torch.rand(1000) * 10
    variance = functional.posterior_variance(hess, ess=123.0, weight_decay=0.01)
    torch.testing.assert_close(functional.posterior_hess(variance, ess=123.0, weight_decay=0.01), hess)


@pytest.mark.parametrize(
    "function",
    [
        "hess_hat_price",
        "newton_direction",
        "posterior_hess",
        "posterior_variance",
        "sample",
        "update_hess",
        "update_momentum",
    ],
)
def test_functions_leave_their_arguments_alone(function):
    """Work in place on an argument would corrupt the state of the optimizer that calls."""
    tensors = [torch.rand(5) + 0.5 for _ in range(3)]
    scalars = {"ess": 3.0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.9}
    count = {"posterior_variance": 1, "posterior_hess": 1, "sample": 3, "newton_direction": 3}.get(function, 2)
    names = {
        "update_momentum": ["beta1"],
        "update_hess": ["beta2", "weight_decay"],
        "newton_direction": ["weight_decay"],
    }
    before = [t.clone() for t in tensors]
    kwargs = {k: scalars[k] for k in names.get(function, ["ess", "weight_decay"])}
    getattr(functional, function)(*tensors[:count], **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_cache_sized_pieces_cover_everything_once():
    """A weight that no piece covers is never trained; one that two cover is trained twice."""
    t = torch.zeros(7, 11)
    for (piece,) in functional.cache_sized(t, max_elements=10):
        assert piece.numel() <= 10
        piece.add_(1)
    assert (t == 1).all()
    transposed = torch.zeros(11, 7).T
    assert [piece.shape for (piece,) in functional.cache_sized(transposed, max_elements=10)] == [transposed.shape]


def test_pieces_are_small_beside_a_model_on_accelerators_too():
    """The integers of a large embedding's noise would take many times its own memory, and the last of a GPU's."""
    t = torch.empty(2**23 + 1, device="meta")
    assert [piece.numel() for (piece,) in functional.cache_sized(t)] == [2**22, 2**22, 1]
