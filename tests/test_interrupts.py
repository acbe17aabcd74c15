"""Ctrl-C and errors while weight samples are put in and taken out: the mean stays whole, and the optimizer usable."""

import signal

import pytest
import torch
from torch import nn

from hf_ivon.interrupts import interrupts_deferred
from hf_ivon.optim import IVON


def make_params():
    """One tensor that has a pass of its own, and two that share a pack."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((200, 200), (10,), (3, 5))]


def test_an_interrupt_on_the_way_out_leaves_the_optimizer_outside(monkeypatch):
    """Ctrl-C while the mean is restored is raised after it; a checkpoint on interrupt must be possible then."""
    params = make_params()
    optimizer = IVON(params, lr=0.1, ess=50.0)
    write = optimizer._sampler._write_means

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        write()

    monkeypatch.setattr(optimizer._sampler, "_write_means", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=True):
            sum(p.square().sum() for p in params).backward()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not optimizer.is_sampled
    optimizer.state_dict()
    optimizer.step()  # the context was whole: its gradients count


def test_products_that_cannot_be_taken_break_the_window_and_not_the_mean(monkeypatch):
    """An error between the sample and its product must be seen, and the step must not run on half of it."""
    params = make_params()
    optimizer = IVON(params, lr=0.1, ess=50.0)
    before = [p.detach().clone() for p in params]

    def broken(*args):
        raise ValueError("no memory")

    monkeypatch.setattr(optimizer._sampler, "take_products", broken)
    with pytest.raises(ValueError, match="no memory"), optimizer.sampled_params(train=True):
        sum(p.square().sum() for p in params).backward()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.is_sampled
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()


def test_an_interrupt_between_mean_and_product_waits():
    """Ctrl-C while the weights are half put back must leave them whole."""
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = IVON(params, lr=0.1, ess=50.0)
    original = optimizer._execution.take_product

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        original(*args)

    optimizer._execution.take_product = interrupted
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=True):
            sum(p.square().sum() for p in params).backward()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_interrupts_are_not_touched_outside_of_the_main_thread():
    """Handlers can only be set in the main thread; elsewhere that would raise."""
    from concurrent.futures import ThreadPoolExecutor

    def inside():
        with interrupts_deferred():
            return "fine"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == "fine"
