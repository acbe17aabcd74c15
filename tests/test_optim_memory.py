"""Whose memory the weights are in: inference mode, casts and moves inside a sample, shared memory, copies."""

import pytest
import torch
from torch import nn

from hf_ivon.optim import IVON
from tests.test_optim import Stop

# Below and above the size from which on tensors are worked on alone.
SIZES = pytest.mark.parametrize("rows", [8, 2**14], ids=["packed", "alone"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(rows: int, dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, IVON]:
    torch.manual_seed(0)
    model = nn.Linear(4, rows).to(dtype)
    return model, IVON(model.parameters(), **{"lr": 0.1, "ess": 1.0, "beta2": 0.9, "fused": False, **options})


def train(model: nn.Module, optimizer: IVON, steps: int = 2) -> None:
    for i in range(steps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(i)).to(model.weight.dtype)
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        optimizer.step()


def assert_same(model: nn.Module, optimizer: IVON, other: nn.Module, reference: IVON) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][name], tensor) for name, tensor in reference.state[q].items())


@SIZES
@DTYPES
@pytest.mark.parametrize("first", ["sample", "posterior_mean", "posterior_variance", "statistics"])
def test_first_use_in_inference_mode_leaves_training_possible(rows, dtype, first):
    """Tensors made in inference mode cannot be written to outside of it: an evaluation first would end training."""
    model, optimizer = make(rows, dtype)
    other, reference = make(rows, dtype)
    before = model.weight.detach().clone()
    with torch.inference_mode():
        if first == "sample":
            with optimizer.sampled_params():
                assert not torch.equal(model.weight, before)
                assert torch.is_inference(model(torch.ones(1, 4, dtype=dtype)))
        elif first == "statistics":
            optimizer.statistics()
        else:
            getattr(optimizer, first)(model.weight)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(model.weight, before)
    train(model, optimizer)
    train(other, reference)
    assert_same(model, optimizer, other, reference)


def test_an_error_before_a_mean_was_kept_is_not_masked(monkeypatch):
    """Without memory for the mean, the user must read that, and not a KeyError that prints a whole parameter."""
    model, optimizer = make(2**14)
    before = model.weight.detach().clone()

    def out_of_memory(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._sampler, "_lanes_apart", out_of_memory)
        with pytest.raises(Stop), optimizer.sampled_params(train=True):
            pass
    assert torch.equal(model.weight, before)
    assert not optimizer._sampler.means
    train(model, optimizer)


@SIZES
@pytest.mark.parametrize("after", ["", "float32", "bfloat16", "float64"])
@DTYPES
@pytest.mark.parametrize("inference", [False, True])
def test_mean_survives_a_cast_inside_a_sample(rows, dtype, after, inference):
    """Evaluation in bf16 casts the model; if that is inside a sample, the model would keep the sample for good."""
    model, optimizer = make(rows, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params(), torch.inference_mode(inference):
        if after:
            model.to(getattr(torch, after))
        else:  # as a move to another device does
            for p in model.parameters():
                p.data = p.detach().clone()
    for p, mean in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, mean.to(p.dtype))


@SIZES
@pytest.mark.parametrize("where", ["before backward", "after backward"])
@pytest.mark.parametrize(("dtype", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_cast_in_training_keeps_the_mean_and_goes_on(rows, where, dtype, after):
    """Products of noise and gradient put the mean back too; and a model cast up has its mean in two places."""
    model, optimizer = make(rows, dtype)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        if where == "before backward":
            model.to(after)
        model(torch.ones(1, 4, dtype=model.weight.dtype)).square().sum().backward()
        model.to(after)
    for p, mean in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, mean.to(after))
    optimizer.step()
    train(model, optimizer)
    for p in model.parameters():
        assert torch.isfinite(p).all()
        assert torch.equal(optimizer.posterior_mean(p).to(after), p)


@pytest.mark.parametrize("rows", [8, 2**14])
def test_bf16_mean_follows_a_parameter_that_got_other_memory(rows):
    """`p.data = loaded` leaves the tensor's version as it was; the mean of before would come back at the next exit."""
    model, optimizer = make(rows, torch.bfloat16)
    train(model, optimizer)
    loaded = torch.randn_like(model.weight)
    model.weight.data = loaded.clone()
    with optimizer.sampled_params():
        pass
    assert torch.equal(model.weight, loaded)
