"""FSDP2: state sharded like the parameters, one sample in all processes, the single-process posterior at the end."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_ivon import IVON, Posterior
from tests import processes
from tests.test_distributed import MICRO, OPTIONS, STEPS, batch, noise_of, share

WIDE = 37  # rows that no number of processes divides


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, WIDE), nn.Tanh(), nn.Linear(WIDE, 1))


def sharded(replicas=1):
    mesh = None
    if replicas > 1:
        mesh = init_device_mesh(
            "cpu", (replicas, torch.distributed.get_world_size() // replicas), mesh_dim_names=("r", "s")
        )
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh) if mesh else fully_shard(layer)
    return fully_shard(model, mesh=mesh) if mesh else fully_shard(model)


def loss_of(model, step, rank, micro, world_size):
    x, y = batch(step, rank, micro, world_size)
    return ((model(x) - y) ** 2).sum() * share(world_size)


def train(model, optimizer, rank, world_size, steps, reduced="last"):
    """As the Trainer does: gradients are reduced in the last micro-batch only, unless in each, or in part in each."""
    for step in steps:
        # A forward pass alone leaves whole copies of the weights behind, of the mean and of a sample.
        with torch.no_grad():
            model(batch(step, rank, 0, world_size)[0])
            with optimizer.sampled_params():
                model(batch(step, rank, 0, world_size)[0])
        for micro in range(MICRO):
            model.set_requires_gradient_sync(reduced != "last" or micro == MICRO - 1)
            model.set_requires_all_reduce(reduced != "in part" or micro == MICRO - 1)
            with optimizer.sampled_params(train=True):
                # FSDP averages over the processes, so the sum over them needs their number.
                (loss_of(model, step, rank, micro, world_size) * world_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def summary(model, optimizer):
    posterior = Posterior.from_optimizer(optimizer, model)
    mean = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return {"mean": mean, "variance": dict(posterior.variance), "digest": posterior.config.mean_digest}


def one_process(world_size, replicas):
    """One sample for the whole window and replica group, seen by the micro-batches of all its processes."""
    model = net()
    optimizer = IVON(model.parameters(), **OPTIONS)
    shards = world_size // replicas
    with noise_of() as coordinates:
        for step in range(STEPS):
            for replica in range(replicas):
                coordinates.update(rank=replica, draw=1)
                with optimizer.sampled_params(train=True):
                    parts = [(replica * shards + s, j) for s in range(shards) for j in range(MICRO)]
                    sum(loss_of(model, step, r, j, world_size) for r, j in parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return summary(model, optimizer)


def with_fsdp(rank, world_size, replicas, reduced):
    model = sharded(replicas)
    optimizer = IVON(model.parameters(), **OPTIONS)
    model(batch(0, rank, 0, world_size)[0]).sum().backward()  # a gradient at the mean, which is not to count
    model.zero_grad()
    train(model, optimizer, rank, world_size, range(STEPS), reduced)
    with pytest.raises(ValueError, match="must be whole to be sampled here"):
        Posterior.from_optimizer(optimizer, model).sample(dict(model.named_parameters()))
    states = list(optimizer.state.values())
    assert all(isinstance(s["hess"], DTensor) and isinstance(s["momentum"], DTensor) for s in states)
    return summary(model, optimizer)


@pytest.mark.parametrize(
    ("world_size", "replicas", "reduced"),
    [
        pytest.param(2, 1, "last", id="reduced at the end"),
        pytest.param(2, 1, "each", id="reduced in each micro-batch"),
        pytest.param(4, 1, "last", id="4 processes", marks=pytest.mark.slow),
        pytest.param(4, 2, "last", id="replica groups"),
        pytest.param(4, 2, "each", id="replica groups, reduced in each micro-batch", marks=pytest.mark.slow),
        pytest.param(4, 2, "in part", id="replica groups, averaged over at the end", marks=pytest.mark.slow),
    ],
)
def test_shards_equal_one_process(tmp_path, world_size, replicas, reduced):
    """The sample of a shard must be the shard of its group's sample, and a group's gradient go with its own noise.

    Tolerance: fp32 round-off of sums in another order, over 10 steps.
    """
    expected = one_process(world_size, replicas)
    results = processes.run(with_fsdp, world_size, tmp_path, replicas, reduced)
    for found in results:
        assert found["digest"] == results[0]["digest"]
        for part in ("mean", "variance"):
            for name, value in expected[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=2e-5, atol=2e-6)


def interrupted(rank, world_size, directory, half):
    model = sharded()
    optimizer = IVON(model.parameters(), **OPTIONS)
    if half == "first":
        train(model, optimizer, rank, world_size, range(4))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory)
        train(model, optimizer, rank, world_size, range(4, 8))
        return summary(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    if half == "read":
        return {**summary(model, optimizer), "window": optimizer.param_groups[0]["window"]}
    train(model, optimizer, rank, world_size, range(4, 8))
    return summary(model, optimizer)


def same(a, b):
    return all(torch.equal(a[part][k], b[part][k]) for part in ("mean", "variance") for k in a[part])


def test_distributed_checkpoints_continue(tmp_path):
    """`torch.distributed.checkpoint` must carry mean, state and the random state, also to another world size."""
    directory = str(tmp_path / "dcp")
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    straight = processes.run(interrupted, 2, tmp_path / "a", directory, "first")
    resumed = processes.run(interrupted, 2, tmp_path / "b", directory, "second")
    assert same(straight[0], resumed[0])
    two = processes.run(interrupted, 2, tmp_path / "c", directory, "read")
    one = processes.run(interrupted, 1, tmp_path / "d", directory, "read")
    assert same(two[0], one[0])
    assert two[0]["window"] == one[0]["window"] == 4


def mistake(rank, world_size, weight, zero):
    model = sharded()
    optimizer = IVON(model.parameters(), **OPTIONS)
    try:
        for micro in range(2):
            with optimizer.sampled_params(train=True, weight=weight):
                if zero:
                    optimizer.zero_grad()
                loss_of(model, 0, rank, micro, world_size).backward()
        optimizer.step()
    except RuntimeError as err:
        return "one weight sample per step" in str(err)
    return False


@pytest.mark.parametrize(("weight", "zero"), [(0.5, False), (1.0, True)])
def test_samples_that_shards_cannot_have_are_refused(tmp_path, weight, zero):
    """Averaging samples of one shard would pair gradients with another sample's noise."""
    assert processes.run(mistake, 2, tmp_path, weight, zero) == [True, True]


def left_out(rank, world_size):
    model = sharded(replicas=2)
    optimizer = IVON(model[0].parameters(), **OPTIONS)
    optimizer.add_param_group({"params": [model[2].weight]})  # and the bias of the same module is in no optimizer
    try:
        with optimizer.sampled_params(train=True):
            loss_of(model, 0, rank, 0, world_size).backward()
    except RuntimeError as err:
        return "must hold all parameters of a sharded module" in str(err)
    return False


@pytest.mark.slow
def test_parameters_that_the_optimizer_lacks_are_refused(tmp_path):
    """A replica group's gradients come in one piece; with parts unknown, others would get the wrong part."""
    assert processes.run(left_out, 4, tmp_path) == [True] * 4


def stale(rank, world_size, clear):
    model = sharded()
    optimizer = IVON(model.parameters(), **OPTIONS)
    for step in range(3):
        with optimizer.sampled_params(train=True):
            if clear and step:
                model.zero_grad()
            try:
                loss_of(model, step, rank, 0, world_size).backward()
            except RuntimeError as err:
                return "Gradients of an earlier step" in str(err)
        optimizer.step()
    return False


@pytest.mark.parametrize("clear", [False, True])
def test_gradients_that_were_not_cleared_are_told_apart(tmp_path, clear):
    """A new gradient in the place of the cleared one was taken for the old one; a real old one must be refused."""
    assert processes.run(stale, 2, tmp_path, clear) == [not clear] * 2
