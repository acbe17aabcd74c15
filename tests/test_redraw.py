"""`low_memory`: samples are taken off by drawing them again, and the Hessian learns as each context ends."""

import copy
import gc
import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_ivon import IVON, execution, functional, sampling
from hf_ivon.execution import Execution
from hf_ivon.fused_passes import redraws
from hf_ivon.native import Native
from hf_ivon.passes import NoiseOptions
from hf_ivon.philox import noise_words, normal_range
from tests import processes
from tests.test_execution import COMPILER, compiled_passes, fused  # noqa: F401, fixtures
from tests.test_native import SIZES, numbers

OPTIONS = {"lr": 0.05, "ess": 200.0, "hess_init": 0.5, "beta1": 0.8, "beta2": 0.9, "weight_decay": 1e-2, "seed": 7}
# Every tensor by itself, also small ones: those in packs keep their means.
ALONE = {**OPTIONS, "foreach": False, "low_memory": True}
SIZE = 2**15 + 8


def make(size=SIZE, dtype=torch.float32, **options):
    p = nn.Parameter(torch.linspace(-1.0, 1.0, size, dtype=dtype))
    return p, IVON([p], **{**ALONE, "fused": False, **options})


def loss_of(p, micro_batch=0):
    return ((2.0 + micro_batch) * (p - 0.3).square()).mean() * 1000


def reference(p, options, steps, micro_batches, weight, ranks=1):
    """Algorithm 1 with a Hessian that learns from each micro-batch, from its formulas and the noise alone."""
    mean, hess = p.detach().clone(), torch.full_like(p, options["hess_init"])
    momentum, ess, decay = torch.zeros_like(p), options["ess"], {"weight_decay": options["weight_decay"]}
    for step in range(steps):
        total, hesses = torch.zeros_like(p), []
        for rank in range(ranks):
            h = hess.clone()
            for micro_batch in range(micro_batches):
                noise = sampling.Noise(0, rank, micro_batch + 1)
                words = noise_words(noise.key({"seed": options["seed"], "window": step}), 0)
                sigma = (ess * (h + options["weight_decay"])) ** -0.5
                perturbation = sigma * normal_range(0, p.numel(), p.numel(), words).to(p.dtype)
                theta = (mean + perturbation).requires_grad_()
                (grad,) = torch.autograd.grad(loss_of(theta, micro_batch) * weight, theta)
                total += grad / ranks
                change = (1 - options["beta2"]) * (grad * perturbation / sigma**2 - (h if micro_batch == 0 else 0.0))
                h = h + change + 0.5 * change**2 / (h + options["weight_decay"])
            hesses.append(h)
        hess = torch.stack(hesses).mean(0)
        momentum = options["beta1"] * momentum + (1 - options["beta1"]) * total
        direction = functional.newton_direction(
            mean, momentum, hess, debias=1 - options["beta1"] ** (step + 1), **decay
        )
        mean = mean - options["lr"] * (options["hess_init"] + options["weight_decay"]) * direction
    return mean, momentum, hess


def train(p, optimizer, steps=3, micro_batches=1, weight=1.0):
    for _ in range(steps):
        optimizer.zero_grad()
        for micro_batch in range(micro_batches):
            with optimizer.sampled_params(train=True, weight=weight):
                loss_of(p, micro_batch).backward()
        optimizer.step()
    return p.detach(), optimizer.state[p]["momentum"], optimizer.state[p]["hess"]


@pytest.mark.parametrize("size", [3, 4, 1001])
@pytest.mark.parametrize(("micro_batches", "weight"), [(1, 1.0), (1, 0.5), (3, 1.0), (3, 0.25)])
def test_steps_are_those_of_the_formulas(size, micro_batches, weight):
    """The option must cost memory nothing but rounding: in fp64 even that is small."""
    p, optimizer = make(size, torch.float64)
    expected = reference(p, ALONE, 3, micro_batches, weight)
    for got, want in zip(train(p, optimizer, 3, micro_batches, weight), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)  # the noise is in fp32


@pytest.mark.parametrize(
    ("fused", "size", "micro_batches"),
    [("eager", SIZE + 1, 3)]
    + [pytest.param("native", s, k, marks=COMPILER) for s in (SIZE, SIZE + 1) for k in (1, 3)]
    + [pytest.param("compiled", SIZE, k, marks=[COMPILER, *[pytest.mark.slow] * (k > 1)]) for k in (1, 3)],
    indirect=["fused"],
)
def test_all_ways_train_the_same_model(fused, size, micro_batches):  # noqa: F811
    """Whether there is a compiler must not show in what is learned."""
    expected = train(*make(size), micro_batches=micro_batches)
    got = train(*make(size, fused=fused), micro_batches=micro_batches)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("fused", [pytest.param(way, marks=COMPILER) for way in ("native", "compiled")], indirect=True)
def test_fused_passes_were_really_taken(fused, monkeypatch):  # noqa: F811
    """The test above would otherwise test the eager way three times."""
    run, taken = execution.fused_passes("cpu"), []

    def spy(name):
        def work(*args, **options):
            taken.append(name)
            return getattr(type(run), name)(run, *args, **options)

        return work

    names = ["sample", "subtract_noise", "update_all" if hasattr(run, "update_all") else "update"]
    for name in names:
        monkeypatch.setattr(run, name, spy(name))
    p, optimizer = make(fused=fused)
    assert redraws(run, "cpu")
    taken.clear()
    train(p, optimizer, steps=1)
    assert taken == names


def test_one_micro_batch_trains_as_with_a_kept_mean():
    """With one context a step it is Algorithm 1 itself; small tensors, in packs, keep their means in both."""
    ends = []
    for low_memory in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 1))
        optimizer = IVON(model.parameters(), **OPTIONS, low_memory=low_memory, fused=False)
        for _ in range(5):
            with optimizer.sampled_params(train=True):
                model(torch.ones(2, 200)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([t for p in model.parameters() for t in (p.detach(), optimizer.state[p]["hess"])])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.compiler
@pytest.mark.parametrize("first", [True, False])
def test_native_pass_takes_off_every_size(first):
    """The last elements of a tensor would keep their noise, or the neighbours lose what they never had."""
    run, eager = Native(), Execution(foreach=False, fused=False)
    options = NoiseOptions(100.0, 1e-3, 0.9, 0.5, first)
    for size in SIZES:
        around = [torch.full((size + 40,), -7.0) for _ in range(2)]
        theta, hess = (t[20 : 20 + size] for t in around)
        for part, start in zip((theta, hess), numbers(size, 2), strict=True):
            part.copy_(start)
        (grad,), words, expected = numbers(size, 1, seed=1), noise_words((size,), 5), [theta.clone(), hess.clone()]
        for given in (grad, None):
            run.subtract_noise(theta, hess, given, words, options)
            list(eager.subtract_noise(*expected, given, words, options))
            torch.testing.assert_close([theta, hess], expected, rtol=1e-5, atol=1e-6)
        assert all((t[:20] == -7).all() and (t[20 + size :] == -7).all() for t in around)


@pytest.mark.parametrize("train_", [False, True])
@pytest.mark.parametrize("fused", ["eager", pytest.param("native", marks=COMPILER)], indirect=True)
def test_mean_comes_back_after_an_error(train_, fused):  # noqa: F811
    """Ctrl-C in the forward pass: the mean is as before, in a prediction bit for bit, in training up to rounding."""
    p, optimizer = make(fused=fused)
    before = p.detach().clone()
    sigma = 1 / (200.0 * 0.51) ** 0.5
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=train_):
        assert (p - before).std() > 0.9 * sigma
        torch.testing.assert_close(optimizer.posterior_mean(p), before, rtol=0, atol=1e-6)
        raise KeyboardInterrupt
    # Two roundings, to half a last bit of weights and samples, which are below 2.
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=2**-22 if train_ else 0)
    assert torch.equal(optimizer.posterior_mean(p), p.detach())


# Each piece has four lanes; two pieces are sampled, and then the noise of both is taken off.
@pytest.mark.parametrize(("name", "call"), [("perturbation", i) for i in range(16)] + [("update_hess", 5)])
def test_mean_comes_back_when_memory_ran_out_halfway(monkeypatch, name, call):
    """A part of the noise is in the weights, or off them, then: to take off all of it would leave a part at -noise."""
    monkeypatch.setattr(execution, "_COLUMNS", SIZE // 8)
    p, optimizer = make()
    before, work, calls = p.detach().clone(), getattr(functional, name), []

    def out_of_memory(*args, **options):
        calls.append(args)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*args, **options)

    monkeypatch.setattr(functional, name, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), optimizer.sampled_params(train=True):
        loss_of(p).backward()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=2**-22)
    optimizer.zero_grad()
    train(p, optimizer)


@pytest.mark.parametrize(
    ("fused", "micro_batches"),
    [
        ("eager", 1),
        ("eager", 2),
        pytest.param("native", 1, marks=COMPILER),
        pytest.param("compiled", 1, marks=COMPILER),
    ],
    indirect=["fused"],
)
def test_nothing_of_the_models_size_is_kept_beside_the_state(fused, micro_batches):  # noqa: F811
    """That is what the option is for; 124 million weights of GPT-2 take half a gigabyte each time."""

    def tensors():
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]

    others = tensors()  # of other tests, some without a storage; held, so that nothing new gets the id of one of them
    p, optimizer = make(fused=fused)

    def buffers():
        ours = {id(t): t for t in tensors()}
        for t in others:
            ours.pop(id(t), None)
        large = [t for t in ours.values() if t.untyped_storage().nbytes() >= 4 * SIZE or t.numel() >= SIZE // 4]
        known = {t.untyped_storage().data_ptr() for t in (p, p.grad, *optimizer.state[p].values()) if t is not None}
        return [t for t in large if t.untyped_storage().data_ptr() not in known]

    for _ in range(2):
        for _ in range(micro_batches):
            with optimizer.sampled_params(train=True):
                assert buffers() == []
                loss_of(p).backward()
            assert buffers() == []
        optimizer.step()
        optimizer.zero_grad()
        with optimizer.sampled_params():  # a prediction keeps the mean, for as long as it takes
            assert buffers() != []
        assert buffers() == []


def test_two_backward_passes_in_one_context_add_up():
    """Two losses with one sample, as in any script; only the whole gradient's product is the step's."""
    ends = []
    for parts in ([1.0], [0.25, 0.75]):
        p, optimizer = make()
        with optimizer.sampled_params(train=True):
            for part in parts:
                (part * loss_of(p)).backward()
        optimizer.step()
        ends.append((p.detach(), optimizer.state[p]["hess"]))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_backward_pass_is_refused_where_the_sample_is_off():
    """Its gradients would be at the mean, and be taken for those at a sample; the weights must not suffer."""
    p, optimizer = make()
    with optimizer.sampled_params(train=True):
        loss_of(p).backward()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"after its sample was taken off.* Run one backward pass per context"):
        with optimizer.sampled_params(train=True):
            loss_of(p).backward()
            loss_of(p).backward()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=2**-22)
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    optimizer.zero_grad()
    train(p, optimizer)


@pytest.mark.parametrize("kind", ["strided", "negative", "float64"])
@pytest.mark.parametrize("fused", ["eager", pytest.param("native", marks=COMPILER)], indirect=True)
def test_gradients_of_other_kinds(kind, fused):  # noqa: F811
    """By address a stride, a pending sign or a dtype is invisible."""
    ends = []
    for replaced in (False, True):
        p, optimizer = make(fused=fused)
        with optimizer.sampled_params(train=True):
            loss_of(p).backward()
            given = p.grad
            if replaced and kind == "strided":
                p.grad = torch.stack([given, torch.zeros_like(given)], dim=1)[:, 0]
            elif replaced and kind == "negative":
                p.grad = torch._neg_view(-given)
            elif replaced:
                p.grad.data = given.double()
        ends.append((p.detach(), optimizer.state[p]["hess"]))
    torch.testing.assert_close(ends[1], ends[0])


def test_a_gradient_that_became_smaller_is_refused():
    """Four numbers would be taken for all; the mean must come back all the same."""
    p, optimizer = make()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="must have its parameter's shape"), optimizer.sampled_params(train=True):
        loss_of(p).backward()
        p.grad.data = torch.ones(4)
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=2**-22)


def test_averaged_contexts_are_refused():
    """Each Hessian estimate has been used by the time the second context shows that it was one of several."""
    p, optimizer = make()
    with pytest.raises(RuntimeError, match=r"cannot be averaged .* pass `low_memory=False`"):
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(p).backward()
    optimizer.zero_grad()
    train(p, optimizer)


@pytest.mark.parametrize(
    "options", [{"hess_approx": "fisher"}, {"hess_approx": "gradsq"}, {"mc_samples": 2}], ids=lambda o: next(iter(o))
)
def test_options_that_need_the_whole_step_are_refused(options):
    """The Hessian would silently be another."""
    with pytest.raises(ValueError, match=r"`low_memory` must go with `hess_approx='price'` and `mc_samples=1`"):
        make(**options)
    p, optimizer = make()
    with pytest.raises(ValueError, match="`low_memory` must be the same in all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "low_memory": False})


def test_a_state_that_it_cannot_go_on_with_is_refused():
    """A Hessian of squared gradients would silently be taken on by the other estimator, as on a resumed run."""
    p, other = make(low_memory=False, hess_approx="fisher", batch_size=4.0)
    train(p, other)
    q, optimizer = make()
    with pytest.raises(ValueError, match=r"`low_memory` must go with `hess_approx='price'`.*got 'fisher'"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["hess_approx"] == "price"
    r, kept = make(low_memory=False)
    train(r, kept)
    optimizer.load_state_dict(copy.deepcopy(kept.state_dict()))
    assert optimizer.param_groups[0]["low_memory"]
    train(q, optimizer)


def test_empty_parameters_are_left_alone():
    """They have no noise to take off: a layer without units must not end training."""
    p, empty = nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.zeros(0, 4))
    optimizer = IVON([p, empty], **ALONE, fused=False)
    with optimizer.sampled_params(train=True):
        (loss_of(p) + empty.sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_that_are_written_to_in_the_forward_pass_are_refused(micro_batches):
    """There is no mean to put back: an embedding with `max_norm` would be left at its rows less the noise, unseen."""
    embedding = nn.Embedding(100, 8, max_norm=0.1)
    optimizer = IVON(embedding.parameters(), **ALONE, fused=False)
    with pytest.raises(RuntimeError, match=r"max_norm.* pass `low_memory=False`"):
        for _ in range(micro_batches):
            with optimizer.sampled_params(train=True):
                embedding(torch.arange(100)).square().sum().backward()
    assert not optimizer.is_sampled


@pytest.mark.compiler
def test_a_gradient_scale_on_the_processor_keeps_to_one_way():
    """Noise put on by one way and taken off by another differs in its last bits, which add up over a run."""
    p, optimizer = make(fused=True, lr=0.0)
    before = p.detach().clone()
    for _ in range(200):
        with optimizer.sampled_params(train=True, grad_scale=torch.tensor(4.0)):
            (4.0 * loss_of(p)).backward()
        optimizer.zero_grad()
    # A random walk of 400 roundings, to half a last bit of numbers below 2, and five of its deviations.
    assert (p - before).abs().max() < 5 * 400**0.5 * 2**-24


def test_an_overflow_leaves_the_hessian_finite():
    """fp16 training meets infinite gradients at first; the scaler skips the step, and training must go on."""
    p, optimizer = make()
    with optimizer.sampled_params(train=True, grad_scale=torch.tensor(4.0)):
        (4.0 * loss_of(p) * torch.where(torch.arange(SIZE) == 5, torch.inf, 1.0)).sum().backward()
    assert not p.grad.isfinite().all()
    optimizer.zero_grad()  # in place of the step
    assert optimizer.state[p]["hess"].isfinite().all()
    train(p, optimizer)
    assert p.isfinite().all()


def test_a_prediction_between_micro_batches_finds_the_mean():
    """What a callback computes there must not depend on how samples are taken off."""
    p, optimizer = make()
    with optimizer.sampled_params(train=True):
        loss_of(p).backward()
    before = p.detach().clone()
    with optimizer.sampled_params():
        assert torch.equal(optimizer.posterior_mean(p), before)
    assert torch.equal(p, before)
    optimizer.step()


def test_training_resumes_bit_for_bit():
    """The noise is a function of what is saved; nothing of it is kept elsewhere."""
    p, optimizer = make()
    train(p, optimizer, 2)
    q, other = make()
    q.data.copy_(p.detach())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(p, optimizer, 2, micro_batches=2)
    train(q, other, 2, micro_batches=2)
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["hess"], other.state[q]["hess"])


def test_weights_that_it_is_not_for_train_as_without_it(caplog):
    """A model in bf16 has its means in fp32 anyway; who hoped to save memory must be told."""
    sampling._say_once.cache_clear()
    ends = []
    for low_memory in (False, True):
        p, optimizer = make(dtype=torch.bfloat16, low_memory=low_memory)
        with caplog.at_level(logging.WARNING):
            train(p, optimizer, 2, micro_batches=2)
        ends.append((p.detach(), optimizer.state[p]["mean"], optimizer.state[p]["hess"]))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert [r.getMessage() for r in caplog.records] == [sampling.NO_EFFECT]


def with_ddp(rank, world_size, steps, micro_batches):
    p = nn.Parameter(torch.linspace(-1.0, 1.0, 100, dtype=torch.float64))
    unused = nn.Parameter(torch.ones(5, dtype=torch.float64))
    module = nn.Module()
    module.p, module.unused = p, unused
    module.forward = lambda micro_batch: loss_of(p, micro_batch) + (unused.sum() * 0.1 if rank == 0 else 0.0)
    ddp = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = IVON(ddp.parameters(), **ALONE, fused=False)
    for _ in range(steps):
        for micro_batch in range(micro_batches):
            ddp.require_backward_grad_sync = micro_batch == micro_batches - 1
            with optimizer.sampled_params(train=True):
                ddp(micro_batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach(), optimizer.state[p]["momentum"], optimizer.state[p]["hess"], unused.detach()] + [
        optimizer.state[unused]["hess"]
    ]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_processes_average_what_their_hessians_learned(tmp_path, micro_batches):
    """Each has its own noise; Hessians that drift apart would make several models of one."""
    results = processes.run(with_ddp, 2, tmp_path, 3, micro_batches)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    p = torch.linspace(-1.0, 1.0, 100, dtype=torch.float64)
    for got, want in zip(results[0], reference(p, ALONE, 3, micro_batches, 1.0, ranks=2), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert not torch.equal(results[0][-1], torch.full((5,), 0.5, dtype=torch.float64))
