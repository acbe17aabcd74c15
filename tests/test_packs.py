"""Packs of small parameters: they follow what happens to parameters, gradients and state, and train the same."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_ivon.execution import Execution
from hf_ivon.optim import IVON
from hf_ivon.packs import pack_key
from hf_ivon.products import Products
from tests.test_execution import COMPILER, fused, make_params, train  # noqa: F401, fixture

OPTIONS = {"lr": 0.1, "ess": 50.0, "beta2": 0.5}


def small_params():
    return make_params()[2:]


def assert_same(params, optimizer, others, reference):
    """Both ways have the same mean and state."""
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert set(optimizer.state[p]) == set(reference.state[q])
        for name, tensor in reference.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name], tensor, rtol=2e-5, atol=2e-6)


def test_packs_follow_parameters_that_move():
    """`p.data = ...` (a model moved, or loaded) gave the parameter another memory; samples must go there."""
    params = make_params()
    optimizer = IVON(params, lr=0.1, ess=50.0)
    train(params, optimizer, steps=1)
    small = params[2]
    small.data = small.detach().clone()
    before = small.detach().clone()
    with optimizer.sampled_params():
        assert not torch.equal(small, before)
    assert torch.equal(small, before)


def test_what_a_frozen_parameter_leaves_of_a_pack_is_trained():
    """Freezing a layer in the middle of training is common; its neighbours in the pack must go on."""
    params = make_params()
    optimizer = IVON(params, lr=0.1, ess=50.0)
    train(params, optimizer, steps=1)
    params[2].requires_grad_(False)
    optimizer.zero_grad()
    frozen, other = params[2].detach().clone(), params[4].detach().clone()
    train([p for p in params if p.requires_grad], optimizer, steps=1)
    assert torch.equal(params[2], frozen)
    assert not torch.equal(params[4], other)


def test_a_parameter_of_a_pack_without_gradient_keeps_its_mean():
    """A branch that a batch does not use has no gradient; its neighbours' products must not be lost with it."""
    params = make_params()
    optimizer = IVON(params, lr=0.1, ess=50.0, beta2=0.5)
    reference = make_params()
    plain = IVON(reference, lr=0.1, ess=50.0, beta2=0.5, foreach=False)
    for some, opt in ((params, optimizer), (reference, plain)):
        train(some[:3], opt, steps=1)
    for p, q in zip(params, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_pack_is_of_one_device_and_one_group():
    """A model spread over devices has small tensors on each; side by side in one buffer they cannot be."""
    here, there = torch.ones(3), torch.ones(3, device="meta")
    group, other = {"ess": 1.0}, {"ess": 1.0}
    assert pack_key(group, here, {}) == pack_key(group, torch.zeros(5), {})
    assert len({pack_key(group, here, {}), pack_key(group, there, {}), pack_key(other, here, {})}) == 3


@pytest.mark.parametrize("options", [{}, {"prior_mean": "init"}, {"hess_approx": "fisher"}], ids=str)
def test_parameters_that_take_turns_are_trained_as_without_packs(options):
    """Heads of several tasks make different numbers of steps, which the debiasing counts."""
    params, others = small_params(), small_params()
    optimizer = IVON(params, **OPTIONS, **options)
    reference = IVON(others, **OPTIONS, **options, foreach=False)
    for some, opt in ((params, optimizer), (others, reference)):
        for turn in ([0, 1, 2], [0, 3], [0, 1, 2, 3, 4], [2, 3, 4]):
            train([some[i] for i in turn], opt, steps=1)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 3, 3, 2]
    assert_same(params, optimizer, others, reference)


def test_a_second_context_keeps_the_products_of_the_first():
    """The buffers of a pack are used again by the next sample; what the first showed must not be lost."""
    params, others = small_params(), small_params()
    optimizer, reference = IVON(params, **OPTIONS), IVON(others, **OPTIONS, foreach=False)
    for some, opt in ((params, optimizer), (others, reference)):
        train(some, opt, steps=2, contexts=3)
    assert_same(params, optimizer, others, reference)


@pytest.mark.parametrize("fused", ["eager", pytest.param("native", marks=COMPILER)], indirect=True)
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("hess_approx", ["price", "fisher"])
def test_contexts_may_reach_different_parameters(fused, averaged, hess_approx):  # noqa: F811
    """A batch does not use every branch: one without a gradient has shown nothing in it, and loses nothing either."""
    params, others = small_params(), small_params()
    options = {**OPTIONS, "hess_approx": hess_approx, "batch_size": 2.0} if hess_approx == "fisher" else OPTIONS
    optimizer = IVON(params, **options, fused=fused)
    reference = IVON(others, **options, fused=fused, foreach=False)
    for some, opt in ((params, optimizer), (others, reference)):
        for turns in (([0, 1], [1, 2, 3], [3]), ([4], [0, 1, 2], [1, 4])):
            for turn in turns:
                with opt.sampled_params(train=True):
                    if averaged:
                        opt.zero_grad()
                    sum(((i + 1.0) * some[i].square()).sum() for i in turn).backward()
            opt.step()
            opt.zero_grad()
    assert_same(params, optimizer, others, reference)


def test_a_step_whose_packs_change_between_its_contexts_keeps_what_the_first_ones_showed():
    """A layer frozen between two micro-batches makes new packs, while the old ones hold products of the step."""
    params, others = small_params(), small_params()
    optimizer, reference = IVON(params, **OPTIONS), IVON(others, **OPTIONS, foreach=False)
    for some, opt in ((params, optimizer), (others, reference)):
        for trained in (some, some[1:], some[1:]):
            with opt.sampled_params(train=True):
                sum((p**3).sum() for p in trained).backward()
            some[0].requires_grad_(False)
        opt.step()
    assert_same(params[1:], optimizer, others[1:], reference)


@pytest.mark.parametrize("retain", [False, True])
def test_two_losses_in_one_of_several_contexts_both_count(retain):
    """Their gradients wait for the end of the context, where the second would take the place of the first."""
    params, others = small_params(), small_params()
    optimizer, reference = IVON(params, **OPTIONS), IVON(others, **OPTIONS, foreach=False)
    for some, opt in ((params, optimizer), (others, reference)):
        for _ in range(2):
            with opt.sampled_params(train=True):
                loss = sum((p**3).sum() for p in some)
                loss.backward(retain_graph=retain)
                (2.0 * loss if retain else sum(p.square().sum() for p in some[1:])).backward()
        opt.step()
    assert_same(params, optimizer, others, reference)


def test_small_parameters_of_a_later_context_are_one_call(monkeypatch):
    """Two thousand calls take twenty microseconds each: as long as several optimizer steps."""
    params, calls, add = small_params(), [], Execution.add_pack_product
    monkeypatch.setattr(Execution, "add_pack_product", lambda *args: calls.append(add(*args)))
    monkeypatch.setattr(Products, "add", None)
    train(params, IVON(params, **OPTIONS), steps=1, contexts=3)
    assert len(calls) == 2  # the products of the first are taken when its means are put back


def test_saved_state_holds_each_tensor_alone():
    """A view is saved with all that it is a part of: two thousand times the whole pack."""
    params = [nn.Parameter(torch.ones(100)) for _ in range(50)]
    optimizer = IVON(params, **OPTIONS)
    train(params, optimizer, steps=1)
    for state in optimizer.state_dict()["state"].values():
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 3 * 4 * 100 * 50 + 50 * 2000
    assert len(pickle.dumps(optimizer)) < 4 * 4 * 100 * 50 + 50 * 3000


@pytest.mark.parametrize("through", ["state_dict", "deepcopy"])
def test_packs_take_in_a_loaded_state(through):
    """The step after loading must be the step that would have followed."""
    params = small_params()
    optimizer = IVON(params, **OPTIONS)
    train(params, optimizer)
    if through == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = IVON(others, **OPTIONS)
        train(others, resumed, steps=1)
        with torch.no_grad():
            torch._foreach_copy_(others, params)
        resumed.load_state_dict(optimizer.state_dict())
    for some, opt in ((params, optimizer), (others, resumed)):
        train(some, opt, steps=2)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][k], resumed.state[q][k]) for k in optimizer.state[p])


def test_state_that_someone_replaced_is_used():
    """`state["momentum"] = zeros` starts the momentum anew; the pack's own would go on from the old one."""
    params, others = small_params(), small_params()
    optimizer, reference = IVON(params, **OPTIONS), IVON(others, **OPTIONS, foreach=False)
    for some, opt in ((params, optimizer), (others, reference)):
        train(some, opt, steps=2)
        opt.state[some[1]]["momentum"] = torch.zeros_like(some[1])
        opt.state[some[2]]["hess"].mul_(2.0)
        del opt.state[some[3]]
        train(some, opt, steps=1)
    assert_same(params, optimizer, others, reference)
