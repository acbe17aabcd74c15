"""Whose memory the weights are in: inference mode, casts and moves inside a sample, shared memory, copies."""

import copy
import pickle

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


@SIZES
@pytest.mark.parametrize("options", [{}, {"hess_approx": "fisher", "batch_size": 4}], ids=["price", "fisher"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_a_step_keeps_of_the_curvature_takes_no_new_memory(rows, options, micro_batches):
    """It stands where the mean was kept: memory of the model's size asked for in each step costs more than its use."""
    model, optimizer = make(rows, **options)
    places = set()
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            with optimizer.sampled_params(train=True):
                model(torch.ones(1, 4)).square().mean().backward()
                places.add(optimizer._sampler.means[model.weight].data_ptr())
            assert optimizer._capture.products.curvature(model.weight).data_ptr() in places
        optimizer.step()
    assert len(places) <= 2  # with accumulation the mean and what was kept before are two


def test_an_error_before_a_mean_was_kept_is_not_masked(monkeypatch):
    """Without memory for the mean, the user must read that, and not a KeyError that prints a whole parameter."""
    model, optimizer = make(2**14)
    before = model.weight.detach().clone()

    def out_of_memory(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._sampler, "borrow", out_of_memory)
        with pytest.raises(Stop), optimizer.sampled_params(train=True):
            pass
    assert torch.equal(model.weight, before)
    assert not optimizer._sampler.means
    train(model, optimizer)


@SIZES
@pytest.mark.parametrize("after", ["", "float32", "bfloat16", "float64"])
@DTYPES
@pytest.mark.parametrize(("inference", "fused"), [(False, False), (True, False), (True, True)])
def test_mean_survives_a_cast_inside_a_sample(rows, dtype, after, inference, fused):
    """Evaluation in bf16 casts the model; if that is inside a sample, the model would keep the sample for good."""
    model, optimizer = make(rows, dtype, fused=fused)
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
@pytest.mark.parametrize("fused", [False, True])
def test_a_cast_in_training_keeps_the_mean_and_goes_on(rows, where, dtype, after, fused):
    """Products of noise and gradient put the mean back too; and a model cast up has its mean in two places."""
    model, optimizer = make(rows, dtype, fused=fused)
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


def tied(kind: str) -> list[nn.Parameter]:
    """Return two parameters on one memory."""
    a = nn.Parameter(torch.randn(1000, 64))
    if kind == "whole":
        return [a, nn.Parameter(a.data)]
    if kind == "transposed":
        return [nn.Parameter(a.data.t()), a]
    if kind == "part":
        return [nn.Parameter(a.data[10:20]), a]
    return [nn.Parameter(torch.zeros(3)), nn.Parameter(a.data[:2]), nn.Parameter(a.data[1:3])]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["whole", "transposed", "part", "packed"])
def test_two_parameters_on_one_memory_are_refused(kind, train):
    """Each would be sampled and updated on top of the other: wrong noise, two steps, and a lost mean."""
    params = tied(kind)
    optimizer = IVON(params, lr=0.1, ess=50.0)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        with pytest.raises(ValueError, match="share memory"), optimizer.sampled_params(train=train):
            pass
    assert all(map(torch.equal, params, before))
    assert not optimizer.is_sampled


def test_parameters_side_by_side_in_one_memory_are_trained():
    """Recurrent layers and sharded ones are parts of one flat tensor; columns of a matrix lie between each other."""
    flat, matrix = torch.randn(30), torch.randn(4, 10)
    parts = [flat[:10], flat[10:30], flat[10:10], matrix[:, :5], matrix[:, 5:]]
    params = [nn.Parameter(part) for part in parts]
    optimizer = IVON(params, lr=0.1, ess=50.0)
    before = flat.clone(), matrix.clone()
    with optimizer.sampled_params():
        assert not torch.equal(flat, before[0])
    assert torch.equal(flat, before[0])
    assert torch.equal(matrix, before[1])


@pytest.mark.parametrize("names", [False, True])
def test_the_refusal_names_the_parameters(names):
    """In a model of hundreds of layers the user must read which two to tie."""
    a = nn.Parameter(torch.randn(1000, 64))
    params = {"embedding": a, "other": nn.Parameter(torch.ones(3)), "head": nn.Parameter(a.data)}
    optimizer = IVON(params.items() if names else params.values(), lr=0.1, ess=50.0)
    expected = "'embedding' and 'head'" if names else "'parameter 0 of group 0, .*' and 'parameter 2 of group 0, .*'"
    with pytest.raises(ValueError, match=expected), optimizer.sampled_params():
        pass


def test_a_frozen_parameter_may_share_memory():
    """It is neither sampled nor updated, and sees what the trained one holds."""
    a = nn.Parameter(torch.randn(1000, 64))
    frozen = nn.Parameter(a.data, requires_grad=False)
    optimizer = IVON([frozen, a], lr=0.1, ess=50.0)
    before = a.detach().clone()
    with optimizer.sampled_params():
        assert torch.equal(frozen, a)
        assert not torch.equal(a, before)
    assert torch.equal(a, before)


def test_mean_survives_memory_shared_in_the_middle_of_training():
    """The second mean is saved when the first sample is there; put back last, it would be taken for the mean."""
    a, b = nn.Parameter(torch.randn(1000, 64)), nn.Parameter(torch.randn(1000, 64))
    optimizer = IVON([a, b], lr=0.1, ess=50.0)
    with optimizer.sampled_params():
        pass
    b.data = a.data
    before = a.detach().clone()
    with optimizer.sampled_params():
        pass
    assert torch.equal(a, before)


@SIZES
@pytest.mark.parametrize("copies", [copy.deepcopy, copy.copy, pickle.dumps], ids=["deepcopy", "copy", "pickle"])
def test_copies_inside_a_sample_are_refused(rows, copies):
    """A copy of model and optimizer would hold the sample, and never get the mean back."""
    model, optimizer = make(rows)
    train(model, optimizer)
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="copied or pickled inside `sampled_params`"):
        copies((model, optimizer) if copies is not copy.copy else optimizer)
    copies((model, optimizer))
