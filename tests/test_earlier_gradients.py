"""Gradients that a training context finds in `p.grad`: at the mean, of an earlier step, cleared by hand."""

import weakref

import pytest
import torch
from torch import nn

from tests.test_optim import assert_equal, make_ivon, make_model, snapshot


def test_step_on_gradients_at_the_mean_raises():
    """Without a sample IVON would silently be a second-order optimizer that learns no curvature."""
    model = make_model()
    optimizer = make_ivon(model.named_parameters())
    before = snapshot(model)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"first: 0.weight.*with optimizer.sampled_params\(train=True\)"):
        optimizer.step()
    assert_equal(model, before)


@pytest.mark.parametrize("where", ["before", "between", "in a prediction sample"])
def test_gradients_at_the_mean_mixed_into_a_window_raise(where):
    """A penalty computed outside the sample would enter the mean's update, but not the Hessian's."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    x = torch.randn(3, 4)

    def outside():
        if where == "in a prediction sample":
            with optimizer.sampled_params(train=False):
                model(x).sum().backward()
        else:
            model(x).sum().backward()

    if where == "before":
        outside()
    with optimizer.sampled_params(train=True):
        model(x).sum().backward()
    if where != "before":
        outside()
    with pytest.raises(RuntimeError, match="not taken at a weight sample"):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1])
def test_gradients_at_the_mean_are_forgotten_when_cleared(steps):
    """Logging a gradient norm at the mean between two steps is legitimate once the gradients are cleared."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    for _ in range(steps):  # from then on hooks see the gradients
        with optimizer.sampled_params(train=True):
            model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        model.zero_grad()
    model(torch.randn(3, 4)).sum().backward()
    model.zero_grad()
    with optimizer.sampled_params(train=True):
        model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["window"] == steps + 1


def test_gradients_of_an_earlier_step_raise():
    """A forgotten `zero_grad` adds up gradients for ever; with IVON the Hessian would not even match them."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    with optimizer.sampled_params(train=True):
        model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="earlier step"), optimizer.sampled_params(train=True):
        model(torch.randn(3, 4)).sum().backward()
    optimizer.zero_grad()
    with optimizer.sampled_params(train=True):
        model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="earlier step"):
        optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, clear=lambda: None) -> None:
    with optimizer.sampled_params(train=True):
        clear()
        model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("earlier", ["of a step", "clipped", "at the mean"])
@pytest.mark.parametrize("by", ["model.zero_grad", "zero_", "optimizer.zero_grad", "set_to_none=False"])
def test_gradients_cleared_inside_a_context_are_forgotten(earlier, by):
    """A loop may zero them anywhere before its backward pass, by any means; the steps are those of a clean start."""
    ends = []
    for cleared_at_once in (True, False):
        torch.manual_seed(0)
        model = make_model()
        optimizer = make_ivon(model.parameters())
        clear = {
            "model.zero_grad": model.zero_grad,
            "zero_": lambda model=model: [p.grad.zero_() for p in model.parameters()],
            "optimizer.zero_grad": optimizer.zero_grad,
            "set_to_none=False": lambda optimizer=optimizer: optimizer.zero_grad(set_to_none=False),
        }[by]
        train(model, optimizer)
        if earlier == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        elif earlier == "at the mean":
            optimizer.zero_grad()
            model(torch.ones(3, 4)).sum().backward()
        if cleared_at_once:
            optimizer.zero_grad()
        if earlier == "at the mean" and by == "zero_" and not cleared_at_once:
            # Zeroed in place they cannot be told from gradients that were changed, and stay marked.
            with pytest.raises(RuntimeError, match="not taken at a weight sample"):
                train(model, optimizer, clear)
            return
        train(model, optimizer, (lambda: None) if cleared_at_once else clear)
        ends.append(snapshot(model))
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_gradients_cleared_inside_a_context_are_free():
    """To know them by name must not keep them: a second set of gradients would take the memory of the model."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    train(model, optimizer)
    earlier = [weakref.ref(p.grad) for p in model.parameters()]
    with optimizer.sampled_params(train=True):
        model.zero_grad()
        assert not any(ref() is not None for ref in earlier)


def test_backward_passes_have_one_hook_a_parameter_until_they_need_two():
    """Each hook in Python costs as much as a small kernel, in every backward pass of every model."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    for _ in range(2):
        train(model, optimizer, optimizer.zero_grad)
    assert not any(p._backward_hooks for p in model.parameters())
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    optimizer.zero_grad()
    for _ in range(2):  # two micro-batches
        with optimizer.sampled_params(train=True):
            model(torch.ones(3, 4)).sum().backward()
    assert all(len(p._backward_hooks) == 1 for p in model.parameters())
