"""Several processes: fresh noise in each, curvature from local gradients, one posterior at the end."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_ivon import IVON
from hf_ivon.sampling import WeightSampler
from tests import processes

STEPS, MICRO, BATCH = 10, 3, 4
OPTIONS = {"lr": 0.05, "ess": 500.0, "hess_init": 0.5, "beta1": 0.8, "beta2": 0.9, "weight_decay": 1e-2, "seed": 7}


class Net(nn.Module):
    """A small network with a branch that only some inputs use."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)
        self.branch, self.never = nn.Linear(8, 8), nn.Linear(2, 2)

    def forward(self, x, branch=False):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden + self.branch(hidden) if branch else hidden)


def net(branches=False):
    torch.manual_seed(3)
    model = Net()
    if not branches:
        model.branch, model.never = None, None
    return model


def batch(step, rank, micro, world_size):
    """One micro-batch of one rank; ragged: the second rank's last one is smaller."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    size = BATCH - 2 if (rank, micro) == (1, MICRO - 1) else BATCH
    x = torch.randn(size, 6, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def share(world_size):
    """The weight of one example in the mean over a window."""
    return 1.0 / (BATCH * MICRO * world_size - 2)


def summary(model, optimizer):
    state = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        state[name] = p.detach().clone()
        state |= {f"{name}.{k}": v.clone() for k, v in optimizer.state[p].items() if k in ("hess", "momentum")}
    return state


@contextmanager
def noise_of():
    """Draw the noise that a process of several would draw: the one named in the mapping that is yielded."""
    perturb, coordinates = WeightSampler.perturb, {}

    def of_rank(key):
        seed, stream, _, window, _ = key
        return seed, stream, coordinates["rank"], window, coordinates["draw"]

    def as_rank(self, packs, draws, train):
        packs = {pack: of_rank(key) for pack, key in packs.items()}
        perturb(self, packs, [replace(draw, key=of_rank(draw.key)) for draw in draws], train)

    WeightSampler.perturb = as_rank
    try:
        yield coordinates
    finally:
        WeightSampler.perturb = perturb


def one_process(world_size, branches=False, approx="price"):
    """The same draws in one process: every rank's micro-batches one after another."""
    model = net(branches)
    optimizer = IVON(model.parameters(), **OPTIONS, hess_approx=approx)
    with noise_of() as coordinates:
        for step in range(STEPS):
            for micro in range(MICRO):
                for rank in range(world_size):
                    coordinates.update(rank=rank, draw=micro + 1)
                    x, y = batch(step, rank, micro, world_size)
                    with optimizer.sampled_params(train=True):
                        used = branches and rank == 0
                        output = model(x, used) if branches else model(x)
                        (((output - y) ** 2).sum() * share(world_size)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return summary(model, optimizer)


def with_ddp(rank, world_size, branches, options, approx):
    model = net(branches)
    ddp = DistributedDataParallel(model, **options)
    optimizer = IVON(ddp.parameters(), **OPTIONS, hess_approx=approx)
    for step in range(STEPS):
        for micro in range(MICRO):
            x, y = batch(step, rank, micro, world_size)
            last = micro == MICRO - 1
            ddp.require_backward_grad_sync = last or "static_graph" in options  # torch syncs a static graph at first
            with optimizer.sampled_params(train=True):
                output = ddp(x, branches and rank == 0) if branches else ddp(x)
                # DistributedDataParallel averages over the processes, so the sum over them needs their number.
                (((output - y) ** 2).sum() * share(world_size) * world_size).backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return summary(ddp, optimizer)


CASES = [
    pytest.param(False, {}, "price", id="plain"),
    pytest.param(False, {"gradient_as_bucket_view": True}, "price", id="gradients as bucket views"),
    pytest.param(False, {"static_graph": True}, "price", id="static graph"),
    pytest.param(True, {"find_unused_parameters": True}, "price", id="unused in some processes"),
    pytest.param(True, {"find_unused_parameters": True}, "gradsq", id="squared gradients"),
    pytest.param(True, {"find_unused_parameters": True}, "fisher", id="Fisher"),
]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("branches", "options", "approx"), CASES)
def test_processes_equal_one_process_with_their_draws(tmp_path, world_size, branches, options, approx):
    """R processes with J micro-batches are R * J micro-batches: mean, momentum and Hessian after 10 steps.

    Tolerance: fp32 round-off of sums in another order, over 10 steps.
    """
    expected = one_process(world_size, branches, approx)
    results = processes.run(with_ddp, world_size, tmp_path, branches, options, approx)
    for name, value in expected.items():
        torch.testing.assert_close(results[0][name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        for other in results[1:]:
            assert torch.equal(other[name], results[0][name]), f"{name} differs between processes"


def draws(rank, world_size):
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    optimizer = IVON(model.parameters(), **OPTIONS)
    result = []
    for train in (True, True, False, False):
        with optimizer.sampled_params(train=train):
            result.append(model.weight.detach().clone())
    return torch.stack(result) - optimizer.posterior_mean(model.weight)


def test_noise_is_fresh_in_every_process_and_common_in_prediction(tmp_path):
    """The same noise everywhere would make several processes worth one sample; prediction needs one model."""
    ranks = processes.run(draws, 2, tmp_path)
    noise = torch.stack(
        [r[i].flatten() for r in ranks for i in (0, 1)] + [ranks[0][2].flatten(), ranks[0][3].flatten()]
    )
    off = torch.corrcoef(noise) - torch.eye(6)
    assert off.abs().max() < 5 / 2000**0.5  # of 2,000 independent draws a correlation has deviation 1 / sqrt(2,000)
    assert torch.equal(ranks[0][2:], ranks[1][2:])


def averaged(rank, world_size, view):
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Linear(6, 1), gradient_as_bucket_view=view)
    optimizer = IVON(model.parameters(), **OPTIONS)
    for step in range(3):
        for sample in range(3):
            x, y = batch(step, rank, sample, world_size)
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return summary(model, optimizer)


@pytest.mark.parametrize("view", [False, True])
def test_samples_are_averaged_in_every_process(tmp_path, view):
    """The paper's loop zeroes the gradients in each context; a bucket's views are then written over by the next."""
    found = processes.run(averaged, 2, tmp_path, view)
    torch.manual_seed(3)
    model = nn.Linear(6, 1)
    optimizer = IVON(model.parameters(), **OPTIONS)
    with noise_of() as coordinates:
        for step in range(3):
            for sample in range(3):
                for rank in range(2):
                    coordinates.update(rank=rank, draw=sample + 1)
                    x, y = batch(step, rank, sample, 2)
                    with optimizer.sampled_params(train=True):
                        optimizer.zero_grad()
                        nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    for name, value in summary(model, optimizer).items():
        torch.testing.assert_close(found[0][name], value, rtol=2e-5, atol=2e-6)
        assert torch.equal(found[0][name], found[1][name])
