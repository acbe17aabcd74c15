"""The optimizer's invariants: the mean outside of samples, parameters of every kind, state, messages."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from hf_ivon.optim import IVON


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def make_ivon(params, **options) -> IVON:
    return IVON(params, **{"lr": 0.1, "ess": 50.0, "hess_init": 0.5, "beta2": 0.9, **options})


def train(model: nn.Module, optimizer: IVON, steps: int = 3) -> None:
    for i in range(steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i)).to(next(model.parameters()).dtype)
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        optimizer.step()


def snapshot(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(model: nn.Module, tensors: list[torch.Tensor]) -> None:
    for p, tensor in zip(model.parameters(), tensors, strict=True):
        assert torch.equal(p, tensor)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("after_backward", [False, True])
def test_mean_survives_whatever_is_raised(error, dtype, after_backward):
    """A crash or Ctrl-C inside a sample would leave noisy weights, and the next checkpoint would save them."""
    model = make_model(dtype)
    optimizer = make_ivon(model.parameters())
    before = snapshot(model)
    with pytest.raises(error), optimizer.sampled_params(train=True):
        loss = model(torch.randn(3, 4, dtype=dtype)).square().mean()
        if after_backward:
            loss.backward()
        raise error
    assert_equal(model, before)
    assert not optimizer.is_sampled


def test_mean_survives_a_closed_generator():
    """A data pipeline written as a generator may be closed inside a sample."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    before = snapshot(model)

    def batches():
        with optimizer.sampled_params(train=True):
            yield 1

    generator = batches()
    next(generator)
    assert not torch.equal(next(model.parameters()), before[0])
    generator.close()
    assert_equal(model, before)


def test_mean_survives_an_interrupt_while_it_is_restored(monkeypatch):
    """Ctrl-C can hit the very copy that restores the mean."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    before = snapshot(model)
    write, calls = optimizer._sampler._write_means, []

    def interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        write()

    monkeypatch.setattr(optimizer._sampler, "_write_means", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=True):
        pass
    assert_equal(model, before)
    assert not optimizer.is_sampled
    assert not optimizer._sampler.means


def test_storages_never_move():
    """DDP buckets, compiled graphs and other modules hold on to the parameters' memory."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    pointers = [p.data_ptr() for p in model.parameters()]
    train(model, optimizer)
    with optimizer.sampled_params():
        assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_nothing_global_is_touched():
    """Dropout masks and data order, or the precision of products (tf32), would change with the optimizer."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    before = torch.get_rng_state()
    settings = (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.get_num_threads())
    with optimizer.sampled_params(train=True):
        sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    after = (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.get_num_threads())
    assert after == settings


def test_state_is_refused_inside_a_sample():
    """A checkpoint written inside a sample would hold noisy weights."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    state = optimizer.state_dict()
    with optimizer.sampled_params():
        for call in (
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(state),
            optimizer.step,
            optimizer.statistics,
        ):
            with pytest.raises(RuntimeError, match="inside `sampled_params`"):
                call()
        with pytest.raises(RuntimeError, match="nested"), optimizer.sampled_params():
            pass


@pytest.mark.parametrize("foreach", [True, False])
def test_parameters_left_out_of_a_step_may_be_zeroed_in_place(foreach):
    """A head that only some batches use: zeroed by `zero_grad(set_to_none=False)`, its gradient is that of no sample.

    It was refused as one taken at the mean. The steps must be those of gradients set to None, where it is skipped.
    """
    x = torch.randn(8, 4)
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, to_none in zip(models, (True, False), strict=True):
        optimizer = make_ivon(model.parameters(), foreach=foreach)
        for part in (model, model[0], model, model[0]):
            with optimizer.sampled_params(train=True):
                part(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert_equal(models[1], snapshot(models[0]))


def test_step_with_closure_samples():
    """PyTorch Lightning and other loops call `step(closure)`; the closure must run at samples, and average them."""
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    optimizer, by_hand = make_ivon(model.parameters(), mc_samples=3), make_ivon(twin.parameters(), mc_samples=3)
    x, seen = torch.randn(8, 4), []

    def closure():
        optimizer.zero_grad()
        seen.append(next(model.parameters()).detach().clone())
        loss = model(x).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    losses = []
    for _ in range(3):
        with by_hand.sampled_params(train=True):
            by_hand.zero_grad()
            losses.append(twin(x).square().mean())
            losses[-1].backward()
    by_hand.step()
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert loss.item() == pytest.approx(sum(losses).item() / 3)
    assert_equal(twin, snapshot(model))


def test_closure_that_does_not_zero_the_gradients_raises():
    """Three samples that add up instead of being averaged are a learning rate three times too large."""
    model = make_model()
    optimizer = make_ivon(model.parameters(), mc_samples=3)
    with pytest.raises(RuntimeError, match=r"closure must call `optimizer.zero_grad\(\)`"):
        optimizer.step(lambda: model(torch.randn(3, 4)).sum().backward() or torch.zeros(()))


def test_mc_samples_must_match_the_contexts():
    """`mc_samples=4` beside a loop with one context would be an option that nothing reads."""
    model = make_model()
    optimizer = make_ivon(model.parameters(), mc_samples=4)
    with optimizer.sampled_params(train=True):
        model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="`mc_samples` is 4, but this step ran 1"):
        optimizer.step()


class Zoo(nn.Module):
    """Parameters of every kind: 0-dim, bf16 beside fp32, frozen, unused, tied."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.narrow = nn.Parameter(torch.randn(4, 4).bfloat16())
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, ids):
        x = self.embedding(ids) * self.scalar + self.frozen
        return self.head(x + (x.bfloat16() @ self.narrow).float())


def test_parameters_of_every_kind():
    """Mixed dtypes, 0-dim, frozen, unused and tied parameters each broke the reference implementation or a port."""
    model = Zoo()
    optimizer = make_ivon(model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            assert torch.equal(model.frozen, before["frozen"]), "a frozen parameter was sampled"
            model(torch.arange(5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"scalar", "narrow", "embedding.weight"}
    assert {n for n, p in model.named_parameters() if optimizer.state[p].get("step", 0) > 0} == moved
    for p in model.parameters():
        for name, value in optimizer.state[p].items():
            assert value.dtype == torch.float32, name


def test_parameter_missing_in_some_micro_batches():
    """A branch that some micro-batches skip (experts, adapters) contributes zero there, and is not an error."""
    model = Zoo()
    optimizer = make_ivon(model.parameters())
    for use_all in (True, False):
        with optimizer.sampled_params(train=True):
            (model(torch.arange(5)).sum() if use_all else model.scalar * 2.0).backward()
    optimizer.step()
    assert optimizer.state[model.narrow]["step"] == 1


def test_groups_differ_and_can_be_added_later():
    """Options by group, and a group unfrozen in the middle of training, are what torch optimizers promise."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = make_ivon([{"params": first.parameters(), "hess_init": 2.0}])
    train(first, optimizer, steps=2)
    optimizer.add_param_group({"params": second.parameters(), "hess_init": 5.0, "ess": 7.0, "weight_decay": 0.5})
    assert torch.allclose(optimizer.posterior_variance(second.weight), torch.tensor(1 / (7.0 * 5.5)))
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        second(first(torch.randn(5, 4))).square().mean().backward()
    optimizer.step()
    assert [g["window"] for g in optimizer.param_groups] == [3, 3]
    assert optimizer.state[first.weight]["step"] == 3
    assert optimizer.state[second.weight]["step"] == 1


def test_bf16_mean_is_kept_in_fp32():
    """Steps smaller than bf16's spacing would be lost, and training would stand still."""
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = IVON([p], lr=1e-4, ess=1e6, beta1=0.0, beta2=1 - 1e-8, rescale_lr=False, weight_decay=0.0)
    for _ in range(100):
        with optimizer.sampled_params(train=True):
            p.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Each step is lr * g / h = about 1e-4; 100 of them move the mean by about 1e-2, two spacings of bf16 below 1.
    assert torch.allclose(optimizer.state[p]["mean"], torch.tensor(0.99), atol=1e-3)
    assert torch.equal(p, optimizer.state[p]["mean"].bfloat16())


def test_bf16_capture_uses_the_perturbation_that_was_applied():
    """Noise below bf16's spacing is rounded away; the Hessian must not be credited with it."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = IVON([p], lr=0.0, ess=1e9, hess_init=1e-3, weight_decay=1e-9)  # sigma 1e-3, spacing 4e-3 to 8e-3
    with optimizer.sampled_params(train=True):
        applied = p.detach().float() - 1.0
        p.sum().backward()
    assert (applied == 0).float().mean() > 0.5
    curvature = optimizer._capture.products.curvature(p)
    assert torch.equal(curvature, applied)


def test_bf16_mean_follows_loaded_weights():
    """`load_best_model_at_end` writes to the parameters; the fp32 mean must follow, keeping what still fits."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = make_ivon([p])
    with optimizer.sampled_params():
        pass
    optimizer.state[p]["mean"] += 1e-4  # rounds to the same bf16
    with torch.no_grad():
        p[1] = 5.0
    assert torch.allclose(optimizer.posterior_mean(p), torch.tensor([1.0001, 5.0, 1.0001]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", ["state_dict", "pickle"])
def test_resume_is_bit_exact(dtype, through):
    """A resumed run would differ from a straight one: lost counts change the first steps and the noise."""
    model = make_model(dtype)
    optimizer = make_ivon(model.parameters(), prior_mean="init", seed=3)
    train(model, optimizer)
    twin = copy.deepcopy(model)
    if through == "state_dict":
        resumed = make_ivon(twin.parameters(), prior_mean="init", seed=11, lr=7.0)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            for name, value in optimizer.state[p].items():
                assert resumed.state[q][name].dtype == value.dtype == torch.float32
    else:
        twin, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer)
    train(twin, resumed)
    assert_equal(twin, snapshot(model))
    assert torch.equal(optimizer.posterior_variance(model[0].weight), resumed.posterior_variance(twin[0].weight))


def test_resume_repeats_a_skipped_windows_count():
    """After a step that was skipped (fp16 overflow) the retry draws fresh noise, in a resumed run too."""
    model = make_model()
    optimizer = make_ivon(model.parameters())

    def draw():
        with optimizer.sampled_params(train=True):
            model(torch.randn(3, 4)).sum().backward()
            return next(model.parameters()).detach().clone()

    first = draw()
    model.zero_grad()  # what a Trainer does after a skipped step
    second = draw()
    assert not torch.equal(first, second)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["window"] == 2


def test_foreign_state_is_refused_and_nothing_changed():
    """AdamW's checkpoint, or one of another model, would be half loaded."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    train(model, optimizer)
    hess = optimizer.state[model[0].weight]["hess"].clone()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="group 0 has no `ess`"):
        optimizer.load_state_dict(adamw.state_dict())
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    other_optimizer = make_ivon(other.parameters())
    train(other, other_optimizer)
    with pytest.raises(ValueError, match=r"has shape \(6, 4\), the parameter \(8, 4\)"):
        optimizer.load_state_dict(other_optimizer.state_dict())
    with pytest.raises(ValueError, match="it is for 2 and there are 4"):
        optimizer.load_state_dict(make_ivon(nn.Linear(4, 6).parameters()).state_dict())
    assert torch.equal(optimizer.state[model[0].weight]["hess"], hess)


def test_fresh_state_round_trips():
    """Accelerate loads an optimizer's own empty state back when it prepares it."""
    model = make_model()
    given = [torch.full_like(p, 2.0) for p in model.parameters()]
    optimizer = make_ivon(model.parameters(), prior_mean=given)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, steps=1)
    assert torch.equal(optimizer.state[model[0].weight]["prior_mean"], given[0])


def test_two_optimizers_on_one_model_do_not_meet():
    """A second trial in a notebook leaves the first optimizer's hooks behind; they must be inert."""
    model = make_model()
    train(model, make_ivon(model.parameters()), steps=1)
    twin = copy.deepcopy(model)
    first, second = make_ivon(model.parameters()), make_ivon(twin.parameters())
    idle = make_ivon(model.parameters())
    with idle.sampled_params(train=True):
        pass
    train(model, first)
    train(twin, second)
    assert_equal(twin, snapshot(model))


def test_prior_mean_pulls():
    """With the prior at given tensors and a flat loss the mean must go there, not to zero."""
    p = nn.Parameter(torch.zeros(3))
    target = torch.tensor([1.0, -2.0, 0.5])
    optimizer = IVON([p], lr=0.5, ess=1e6, weight_decay=1.0, prior_mean=[target], rescale_lr=False)
    for _ in range(100):
        with optimizer.sampled_params(train=True):
            (p * 0.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(p, target, atol=1e-4)


BAD = {
    "lr": -1.0,
    "ess": "auto",
    "hess_init": 0.0,
    "beta1": 1.0,
    "beta2": -0.1,
    "weight_decay": -1e-4,
    "mc_samples": 0,
    "clip_radius": 0.0,
    "rescale_lr": "yes",
    "debias": 1,
    "hess_approx": "ggn",
    "prior_mean": "mean",
    "seed": -1,
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("in_group", [False, True])
def test_bad_options_are_named(name, in_group):
    """A value out of range must say which one, what is allowed, and what to do."""
    params = list(make_model().parameters())
    with pytest.raises(ValueError, match=f"^`{name}` must be .*, got .*\\. ."):
        make_ivon(
            [{"params": params, name: BAD[name]}] if in_group else params, **({} if in_group else {name: BAD[name]})
        )


def test_bad_prior_means_are_named():
    """Prior means in another order than the parameters would pull every weight to the wrong place."""
    params = list(nn.Linear(2, 3).parameters())
    good = [torch.zeros(3, 2), torch.zeros(3)]
    for bad, message in [
        (good[:1], "got 1 for 2"),
        (good[::-1], r"got \(3,\) for parameter 0 of shape \(3, 2\)"),
        ([good[0], torch.tensor([0.0, math.nan, 0.0])], "NaN or inf in tensor 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_ivon(params, prior_mean=bad)
    optimizer = make_ivon(params, prior_mean=good)
    with pytest.raises(ValueError, match="for the new group too"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_sparse_gradients_are_refused():
    """`nn.Embedding(sparse=True)` yields gradients that the noise cannot be paired with."""
    embedding = nn.Embedding(5, 4, sparse=True)
    optimizer = make_ivon(embedding.parameters())
    with pytest.raises(RuntimeError, match="sparse=False"), optimizer.sampled_params(train=True):
        embedding(torch.arange(3)).sum().backward()


def test_autograd_grad_is_refused_where_gradients_are_read_in_the_backward_pass():
    """Gradients taken by `torch.autograd.grad` fire the same hooks and would enter the Hessian alone."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    with pytest.raises(RuntimeError, match="autograd.grad"), optimizer.sampled_params(train=True, weight=0.5):
        torch.autograd.grad(model(torch.randn(3, 4)).sum(), list(model.parameters()))


def test_a_gradient_penalty_trains():
    """`torch.autograd.grad` within a loss leaves no trace of its own: the step is that of the loss's gradient."""
    ends = []
    for penalized in (True, False):
        p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = make_ivon([p])
        with optimizer.sampled_params(train=True):
            (grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True) if penalized else (3 * p**2,)
            (p**3).sum().add(0.1 * grad.square().sum()).backward()
        optimizer.step()
        ends.append((p.detach(), optimizer.state[p]["hess"]))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_learning_rate_and_gradients_only_allocate_state():
    """torch.distributed.checkpoint calls `step()` with lr=0 and zero gradients before it loads a state."""
    model = make_model()
    optimizer = make_ivon(model.parameters(), lr=0.0)
    before = snapshot(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(model, before)
    assert all("hess" in optimizer.state[p] for p in model.parameters())


def test_statistics_describe_the_posterior():
    """Logs are how people see whether the posterior is learnt, collapsed or clipped."""
    p = nn.Parameter(torch.tensor([0.0, 3.0, -3.0, 4.0]))
    optimizer = IVON([p], lr=0.1, ess=100.0, hess_init=1.0, weight_decay=0.0, clip_radius=1e-3, beta2=0.5)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            (p * torch.tensor([1.0, 1.0, 1.0, 0.0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = optimizer.statistics()
    hess = optimizer.state[p]["hess"]
    assert stats["hess_rel_q50"] in hess.tolist()
    assert stats["sigma_q99"] == pytest.approx((100 * hess.min()).rsqrt().item())
    assert stats["clipped_share"] == pytest.approx(0.75)
    assert stats["snr_share"] == pytest.approx(0.75)


def test_dropped_window_warns_once(caplog):
    """A Monte-Carlo loop that zeroes outside of the contexts keeps its last sample only; the log must say so."""
    model = make_model()
    optimizer = make_ivon(model.parameters())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                model(torch.randn(3, 4)).sum().backward()
            optimizer.zero_grad()
    assert len([r for r in caplog.records if "dropped gradients" in r.message]) == 1


@pytest.mark.parametrize(("name", "value"), [("foreach", False), ("fused", True)])
def test_how_passes_run_is_not_an_option_of_a_group(name, value):
    """It was read from the optimizer alone: a group's own value had no effect, silently."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"`{name}` must be the same in all groups"):
        make_ivon([{"params": [p]}, {"params": [q], name: value}])
    optimizer = make_ivon([p], **{name: value})
    optimizer.add_param_group({"params": [q], name: value})
