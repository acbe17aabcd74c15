"""The passes in C++: equal to those in Python for every size and value, and safe where they work by address."""

import ctypes
import math
import sys

import pytest
import torch

from hf_ivon import fused_passes, native, passes, philox
from hf_ivon.execution import Execution
from hf_ivon.native import Native
from hf_ivon.optim import IVON
from hf_ivon.passes import NoiseOptions, UpdateOptions

pytestmark = pytest.mark.compiler

OPTIONS = UpdateOptions(100.0, 1e-3, 0.9, 0.999, 0.1, 1.0, 0.1, 1.0, True, False)
# A vector has up to 16 elements, and noise four lanes: all remainders, and sizes that several threads share.
SIZES = [*range(1, 150), 2**15, 2**16 + 1, 2**17 + 37]
EAGER = Execution(foreach=False, fused=False)


@pytest.fixture(scope="module")
def run():
    """The passes in C++; the tests here need a compiler, as those of `torch.compile` do."""
    return Native()


def numbers(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) + 0.1 for _ in range(count)]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_size_is_sampled_to_its_end_and_no_further(run, threads, monkeypatch):
    """The last elements of a tensor, or of a thread's share, would keep the mean, or the neighbours be overwritten."""
    monkeypatch.setattr(native, "_threads", lambda elements: threads)
    # Means of large tensors go past the caches where their addresses allow it: with the second start.
    for start, size in [(20, size) for size in SIZES] + [(16, 2**20), (16, 2**20 + 37), (20, 2**20)]:
        # Other numbers on both sides, which must stay.
        around = [torch.full((size + 40,), -7.0) for _ in range(2)]
        theta, mean = (t[start : start + size] for t in around)
        before, hess = numbers(size, 2)
        theta.copy_(before)
        words = philox.noise_words((size,), 5)
        run.sample(theta, mean, hess, words, 100.0, 1e-3)
        expected = before.clone()
        EAGER.sample(expected, before, hess, words, ess=100.0, weight_decay=1e-3)
        assert torch.equal(mean, before)
        torch.testing.assert_close(theta, expected, rtol=1e-6, atol=1e-6)
        assert all((t[:start] == -7).all() and (t[start + size :] == -7).all() for t in around)


def test_weights_in_bf16_have_their_means_apart(run):
    """Most models are trained in bf16; their noise would be drawn in tensor operations, thirty times as slowly."""
    for size in SIZES:
        mean, hess, total = numbers(size, 3)
        theta, before, words = torch.empty(size, dtype=torch.bfloat16), mean.clone(), philox.noise_words((size,), 5)
        run.sample(theta, mean, hess, words, 100.0, 1e-3, keep=False)
        expected = mean.clone()
        EAGER.sample(expected, mean, hess, words, ess=100.0, weight_decay=1e-3)
        assert torch.equal(mean, before)
        torch.testing.assert_close(theta.float(), expected, rtol=2**-8, atol=1e-6)  # half of a last bit
        got, grad = total.clone(), hess.bfloat16()
        run.add_product(got, theta, mean, grad, 0.5)
        passes.add_product(total, theta, mean, grad, 0.5)
        torch.testing.assert_close(got, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_means_follow_what_was_written_to_their_weights(run, dtype):
    """What an average of weights or a checkpoint puts there would be overwritten by the old mean."""
    for size in SIZES:
        mean, written, _ = numbers(size, 3)
        mean[::7] = torch.nan
        theta = mean.to(dtype)
        theta[::3], theta[1::5] = written[::3].to(dtype), torch.nan
        expected = mean.clone()
        passes.adopt(theta, expected)
        run.adopt(theta, mean)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("squared", [False, True])
def test_products_of_every_size(run, threads, squared, monkeypatch):
    """As above: what the gradient says of the last weights would be lost."""
    monkeypatch.setattr(native, "_threads", lambda elements: threads)
    for size in SIZES:
        theta, mean, grad, total = numbers(size, 4)
        t, m, s = theta.clone(), mean.clone(), total.clone()
        if squared:
            run.square(total, grad, 0.5, True)
            passes.square(s, grad, 0.5, True)
        else:
            run.add_product(total, theta, mean, grad, 0.5)
            passes.add_product(s, t, m, grad, 0.5)
        torch.testing.assert_close(total, s)
        run.take_product(theta, mean, grad, 0.5, squared)
        passes.take_product(t, m, grad, 0.5, squared)
        assert torch.equal(theta, t)
        torch.testing.assert_close(mean, m)


def errors_of_draws(drawn, words):
    """What draws of a tensor, and those in Python, are away from draws that are computed in fp64."""
    columns = torch.arange(len(drawn) // 4)
    w = philox.philox4x32((columns, *words[2:]), (words[0], words[1]))
    exact = []
    for first, second in ((w[0], w[1]), (w[2], w[3])):
        uniform = ((first >> 8).float() + 0.5).double() * 2.0**-24
        angle = ((second >> 8).double() - (2.0**23 - 0.5)) * 2.0**-23 * math.pi
        radius = (-2 * uniform.log()).sqrt()
        exact += [radius * angle.cos(), radius * angle.sin()]
    in_python = torch.cat(philox.normal_lanes(columns, words))
    return [(d.double() - torch.cat(exact)).abs() for d in (drawn, in_python)]


def test_draws_are_as_exact_as_in_python(run):
    """Another logarithm and other roundings are fine, a worse approximation is not."""
    size, words = 2**20, philox.noise_words((5,), 3)
    drawn, mean, hess = torch.zeros(size), torch.zeros(size), torch.ones(size)
    run.sample(drawn, mean, hess, words, 1.0, 0.0)
    errors = errors_of_draws(drawn, words)
    assert errors[0].max() < 1.5 * errors[1].max() < 1e-5
    assert errors[0].mean() < 1.5 * errors[1].mean() < 1e-6


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(("price", "average"), [(True, False), (False, True), (False, False)])
def test_updates_of_every_size(run, gradient, momentum, prior, price, average):
    """All estimators, priors and precisions; a step that is wrong for some is training gone wrong without a word."""
    for size in [*range(1, 40), 2**15 + 3]:
        mean, grad, curvature, average_grad, hess, prior_mean = numbers(size, 6)
        tensors = [mean, grad.to(gradient), curvature - 0.5, average_grad.to(momentum), hess]
        expected = [t.clone() for t in tensors]
        options = OPTIONS._replace(price=price, average=average, divisor=3.0, clip_radius=0.5)
        run.update((*tensors, prior_mean if prior else None), options)
        passes.update(*expected, prior_mean if prior else None, *options)
        for got, want in zip(tensors, expected, strict=True):
            bf16 = got.dtype == torch.bfloat16  # a last bit may be rounded the other way
            torch.testing.assert_close(got, want, rtol=8e-3 if bf16 else 2e-6, atol=1e-6)


def test_values_at_the_ends_of_the_range_come_out_as_in_python(run):
    """A NaN that a pass swallows hides a broken run; an infinity that becomes NaN breaks a good one."""
    # No two that overflow by a sum: there a fused multiplication and addition goes further.
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-38, 1e30, -1e30, 1e-45, 1.0]
    a, b = (t.flatten() for t in torch.meshgrid(torch.tensor(special), torch.tensor(special), indexing="ij"))
    hess = torch.full_like(a, 0.1)
    for changed in range(3):
        for clip_radius in (1e-3, sys.float_info.max):
            tensors = [a.clone() if i == changed else torch.full_like(a, 0.5) for i in range(3)]
            tensors += [b.clone(), hess.clone()]
            expected = [t.clone() for t in tensors]
            options = OPTIONS._replace(clip_radius=clip_radius)
            run.update((*tensors, None), options)
            passes.update(*expected, None, *options)
            for got, want in zip(tensors, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)
    for hess in (torch.tensor(special).clamp_min(0), torch.full((9,), 3e38), torch.full((9,), 1e-30)):
        theta, mean = torch.ones_like(hess), torch.empty_like(hess)
        expected, words = theta.clone(), philox.noise_words((1,), 1)
        run.sample(theta, mean, hess, words, 1e6, 0.0)
        EAGER.sample(expected, mean, hess, words, ess=1e6, weight_decay=0.0)
        torch.testing.assert_close(theta, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_bf16_is_rounded_as_torch_does(run):
    """A momentum that is cut off instead of rounded drifts to zero."""
    words = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    grad = words.view(torch.float32)
    momentum = torch.zeros(grad.shape, dtype=torch.bfloat16)
    tensors = [torch.zeros_like(grad), grad, torch.zeros_like(grad), momentum, torch.ones_like(grad)]
    run.update((*tensors, None), OPTIONS._replace(beta1=0.0))
    assert torch.equal(momentum.isnan(), grad.isnan())
    finite = ~grad.isnan()
    assert torch.equal(momentum[finite], grad.bfloat16()[finite])


def test_bytes_that_each_pass_moves(monkeypatch, tmp_path):
    """Memory is what a pass costs: one more tensor that is read is a tenth of a step, and nobody would see it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-DIVON_COUNT_BYTES"])
    monkeypatch.setattr(native, "_threads", lambda elements: 1)
    library, size = native.build(), 4 * 16 * 25
    monkeypatch.setattr(native, "build", lambda: library)
    run, counted = Native(), ctypes.c_int64.in_dll(library, "ivon_bytes")
    mean, grad, curvature, momentum, hess, prior_mean = numbers(size, 6)
    bf16 = momentum.bfloat16()

    def per_weight(work):
        counted.value = 0
        work()
        return counted.value / size

    sample = {"words": philox.noise_words((1,), 1), "ess": 100.0, "weight_decay": 1e-3}
    assert per_weight(lambda: run.sample(grad, mean, hess, **sample)) == 16
    assert per_weight(lambda: run.sample(bf16, mean, hess, **sample, keep=False)) == 10
    options = NoiseOptions(100.0, 1e-3, 0.9, 1.0, True)
    assert per_weight(lambda: run.sample(grad, grad, hess, **sample, keep=False)) == 12
    assert per_weight(lambda: run.subtract_noise(grad, hess, mean, sample["words"], options)) == 20
    assert per_weight(lambda: run.take_product(mean, curvature, grad, 1.0, False)) == 20
    assert per_weight(lambda: run.add_product(curvature, mean, prior_mean, grad, 1.0)) == 20
    assert per_weight(lambda: run.square(curvature, grad, 1.0, False)) == 8
    assert per_weight(lambda: run.update((mean, grad, curvature, momentum, hess, None), OPTIONS)) == 32
    assert per_weight(lambda: run.update((mean, bf16, curvature, momentum, hess, None), OPTIONS)) == 30
    assert per_weight(lambda: run.update((mean, grad, None, momentum, hess, None), OPTIONS)) == 24
    assert per_weight(lambda: run.update((mean, grad, curvature, bf16, hess, prior_mean), OPTIONS)) == 32


def trained(params, **options):
    return IVON(params, lr=0.1, ess=50.0, beta2=0.5, fused=True, **options)


def two_trained(size):
    """Two parameters of ones, almost of one size, and their optimizer."""
    p, other = torch.nn.Parameter(torch.ones(size)), torch.nn.Parameter(torch.ones(size + 4))
    return p, other, trained([p, other])


def test_memory_that_moves_inside_a_sample_is_followed():
    """`share_memory_` frees what the addresses of before point to; others' numbers would be overwritten."""
    for size in (300, 40_000):  # in a pack, and alone
        p = torch.nn.Parameter(torch.ones(size))
        optimizer = trained([p])
        for _ in range(2):
            optimizer.zero_grad()
            before = p.detach().clone()
            with optimizer.sampled_params(train=True):
                p.square().sum().backward()
                p.data.share_memory_()
                optimizer.state[p]["hess"].share_memory_()
                others = [torch.full((size,), 3.0) for _ in range(8)]
            assert torch.equal(p, before)
            optimizer.step()
            assert not torch.equal(p, before)
            assert all((other == 3.0).all() for other in others)


@pytest.mark.parametrize("size", [300, 40_000])
def test_a_gradient_that_became_smaller_is_refused(size):
    """By address, the pass would read what lies behind it."""
    p, other, optimizer = two_trained(size)
    with pytest.raises(RuntimeError, match="must have its parameter's shape|must match"):
        with optimizer.sampled_params(train=True):
            (p.square().sum() + other.square().sum()).backward()
            p.grad.data = torch.ones(size // 4)
    assert (p == 1).all()
    assert (other == 1).all()


@pytest.mark.parametrize("size", [300, 40_000])
def test_weights_that_became_smaller_inside_a_sample_leave_the_others_their_means(size):
    """An embedding that is resized there is an error of the caller, but the rest of the model must not be lost."""
    p, other, optimizer = two_trained(size)
    with pytest.raises(RuntimeError, match="size|shape"):
        with optimizer.sampled_params(train=True):
            (p.square().sum() + other.square().sum()).backward()
            p.data = torch.zeros(size // 2)
    assert (other == 1).all()
    assert not optimizer.is_sampled


def test_buffers_are_fp32_whatever_the_default_dtype():
    """With a default of bf16 they would be half as long as the passes take them to be."""
    p = torch.nn.Parameter(torch.ones(300))
    optimizer = trained([p])
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                p.square().sum().backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    [pack] = optimizer._roster.packs
    kinds = {name: buffer.flat.dtype for name, buffer in pack._buffers.items() if name != "step"}
    assert set(kinds.values()) == {torch.float32}, kinds
    assert {buffer.flat.dtype for buffer in pack._spare} == {torch.float32}


@pytest.mark.parametrize("size", [300, 40_000])
def test_writes_are_counted_so_that_autograd_notices_them(size):
    """A backward pass through weights of before would give wrong gradients instead of an error."""
    p = torch.nn.Parameter(torch.ones(size))
    optimizer = trained([p])
    versions = [p._version]
    with optimizer.sampled_params(train=True):
        versions.append(p._version)
        p.square().sum().backward()
    versions.append(p._version)
    optimizer.step()
    versions.append(p._version)
    assert versions == sorted(set(versions))


@pytest.mark.parametrize("size", [300, 40_000])
@pytest.mark.parametrize("kind", ["strided", "float64", "negative"])
def test_gradients_of_other_kinds_are_read_as_they_are_meant(size, kind):
    """By address a stride, a dtype or a pending sign is invisible: the step would go anywhere, or uphill."""
    ends = []
    for fused in (False, True):
        p = torch.nn.Parameter(torch.linspace(0.5, 1.0, size))
        optimizer = IVON([p], lr=0.1, ess=50.0, beta2=0.5, fused=fused)
        with optimizer.sampled_params(train=True):
            p.square().sum().backward()
            given = p.grad.clone()
            if kind == "strided":
                p.grad = torch.stack([given, torch.zeros_like(given)], dim=1)[:, 0]
            elif kind == "negative":
                p.grad = torch._neg_view(-given)
            else:
                p.grad.data = given.double()
        optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    assert (ends[1] < torch.linspace(0.5, 1.0, size)).float().mean() > 0.9


def test_a_parameter_of_a_pack_without_gradient_gets_its_mean_back():
    """There is no address to read from; the others' products must not be lost for it."""
    used, unused = torch.nn.Parameter(torch.ones(300)), torch.nn.Parameter(torch.ones(200))
    optimizer = trained([used, unused])
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            assert not (unused == 1).any()
            used.square().sum().backward()
        assert (unused == 1).all()
        optimizer.step()
    assert (unused == 1).all()
    assert (used < 1).all()


@pytest.mark.parametrize("size", [100, 200])
def test_a_transposed_weight_gets_its_own_mean_back(size):
    """Transformers transposes heads by `weight.data = weight.data.T`: the same address, in another order."""
    p = torch.nn.Parameter(torch.arange(size * size, dtype=torch.float32).view(size, size))
    optimizer = trained([p])
    with optimizer.sampled_params():
        pass
    p.data = p.data.t()
    before = p.detach().clone()
    with optimizer.sampled_params():
        pass
    assert torch.equal(p, before)


@pytest.mark.parametrize("size", [300, 40_000])
def test_a_weight_that_was_enlarged_is_refused(size):
    """`resize_token_embeddings` after the optimizer was made: its Hessian has not grown, and lies before others."""
    p = torch.nn.Parameter(torch.ones(size))
    optimizer = trained([p])
    with optimizer.sampled_params():
        pass
    p.data = torch.ones(2 * size)
    with pytest.raises(RuntimeError, match="size"), optimizer.sampled_params():
        pass


@pytest.mark.parametrize("size", [300, 40_000])
def test_a_loss_scale_of_a_wrong_shape_leaves_all_means(size):
    """The error must be about the scale, and the other weights not stay at the sample."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (size, 50_000)]
    optimizer = trained(params)
    with pytest.raises(RuntimeError, match="size"):
        with optimizer.sampled_params(train=True, grad_scale=torch.tensor([8.0, 8.0, 8.0])):
            sum(p.square().sum() for p in params).backward()
    assert all((p == 1).all() for p in params)


def test_the_check_is_made_in_fp32_whatever_the_default_dtype():
    """Numbers of two bytes would be overrun by those of four."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        fused_passes.check(Native(), "cpu")
    finally:
        torch.set_default_dtype(torch.float32)


def test_large_tensors_are_shared_by_the_threads(monkeypatch):
    """Half of a machine would stand idle; and small tensors would wait for threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [native._threads(elements) for elements in (1, 2**15, 2**20)] == [1, 2, 4]
