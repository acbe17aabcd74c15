"""The passes in Triton: equal to those in Python for every size and value; run by its interpreter without a GPU."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from hf_ivon import execution, fused_passes, passes, philox, triton_passes
from hf_ivon.execution import Execution
from hf_ivon.optim import IVON
from hf_ivon.passes import NoiseOptions, UpdateOptions
from hf_ivon.triton_passes import TritonPasses
from tests.test_native import errors_of_draws

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EAGER = Execution(foreach=False, fused=False)
# The interpreter rounds to bf16 towards zero, by up to one last bit; GPUs do not, see the last test.
BF16_TOLERANCE = 2**-8 if DEVICE == "cuda" else 2**-7
# Lanes that are shorter or missing, and the ends of one and two programs.
SIZES = [*range(1, 14), 1023, 1024, 1025, 2047, 2048, 2049, 5000]


@pytest.fixture(scope="module")
def run():
    return TritonPasses()


def numbers(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, generator=generator) + 0.1).to(DEVICE) for _ in range(count)]


def assert_same(got, expected, **options):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-6, "atol": 1e-6} | options))


def test_every_size_is_sampled_to_its_end_and_no_further(run):
    """The last elements of a tensor would keep the mean, or its neighbours in memory be overwritten."""
    for start, size in [(20, size) for size in SIZES] + [(16, 4096)]:
        around = [torch.full((size + 40,), -7.0, device=DEVICE) for _ in range(2)]
        theta, mean = (t[start : start + size] for t in around)
        before, hess = numbers(size, 2)
        theta.copy_(before)
        words = philox.noise_words((size,), 2**32 - 5)
        assert run.sample(theta, mean, hess, words, 100.0, 1e-3)
        expected = before.clone()
        EAGER.sample(expected, before, hess, words, ess=100.0, weight_decay=1e-3)
        assert torch.equal(mean, before)
        assert_same([theta], [expected])
        assert all((t[:start] == -7).all() and (t[start + size :] == -7).all() for t in around)


def test_a_shard_has_its_part_of_the_noise(run, monkeypatch):
    """A sharded model would be sampled by dozens of launches a weight matrix, or with noise that its shards share."""
    monkeypatch.setattr(execution, "fused_passes", lambda device_type: run)
    fused, words = Execution(foreach=False, fused=True), philox.noise_words((3,), 5)
    for total in (1, 7, 41, 4096, 5001):
        mean, hess = numbers(total, 2)
        whole = mean.clone()
        EAGER.sample(whole, mean, hess, words, ess=100.0, weight_decay=1e-3)
        for shards in (1, 2, 3, 7):
            theta, rows = torch.zeros(total, device=DEVICE), -(-total // shards)
            for start in range(0, total, rows):
                part = slice(start, start + rows)
                options = {"ess": 100.0, "weight_decay": 1e-3, "start": start, "total": total}
                with monkeypatch.context() as patch:
                    patch.setattr(execution, "normal_range", None)
                    fused.sample(theta[part], mean[part], hess[part], words, **options)
            assert_same([theta], [whole])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_have_their_means_apart(run, dtype):
    """Most models are trained in bf16; their noise would be drawn in many launches."""
    for size in SIZES:
        mean, hess, total = numbers(size, 3)
        theta, before = torch.empty(size, dtype=dtype, device=DEVICE), mean.clone()
        words = philox.noise_words((size,), 5)
        run.sample(theta, mean, hess, words, 100.0, 1e-3, keep=False)
        expected = mean.clone()
        EAGER.sample(expected, mean, hess, words, ess=100.0, weight_decay=1e-3)
        assert torch.equal(mean, before)
        assert_same([theta.float()], [expected], rtol=BF16_TOLERANCE)
        got, grad = total.clone(), hess.to(dtype)
        run.add_product(got, theta, mean, grad, 0.5)
        passes.add_product(total, theta, mean, grad, 0.5)
        assert_same([got], [total])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])])
def test_means_follow_what_was_written_to_their_weights(run, dtype):
    """What an average of weights or a checkpoint puts there would be overwritten by the old mean."""
    for size in SIZES:
        mean, written = numbers(size, 2)
        mean[::7] = torch.nan
        theta = mean.to(dtype)
        theta[::3], theta[1::5] = written[::3].to(dtype), torch.nan
        expected = mean.clone()
        passes.adopt(theta, expected)
        run.adopt(theta, mean)
        assert_same([mean], [expected], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("squared", [False, True])
def test_products_of_every_size(run, squared):
    """What the gradient says of the last weights would be lost."""
    for size in SIZES:
        theta, mean, grad, total = numbers(size, 4)
        t, m, s = theta.clone(), mean.clone(), total.clone()
        if squared:
            run.square(total, grad, 0.5, size % 2 == 0)
            passes.square(s, grad, 0.5, size % 2 == 0)
        else:
            run.add_product(total, theta, mean, grad, 0.5)
            passes.add_product(s, t, m, grad, 0.5)
        run.take_product(theta, mean, grad, 0.5, squared)
        passes.take_product(t, m, grad, 0.5, squared)
        assert torch.equal(theta, t)
        assert_same([total, mean], [s, m])


@pytest.mark.parametrize("first", [False, True])
def test_noise_is_taken_off_and_the_hessian_learns(run, first):
    """With `low_memory` there is no mean to put back; a NaN in a gradient must not stay in the Hessian."""
    for size in SIZES:
        mean, hess, grad = numbers(size, 3)
        grad[::4], grad[1::4] = torch.nan, torch.inf
        words, options = philox.noise_words((size,), 7), NoiseOptions(100.0, 1e-3, 0.9, 2.0, first)
        theta = mean.clone()
        run.sample(theta, theta, hess, words, 100.0, 1e-3, keep=False)
        held, other, learned = theta.clone(), theta.clone(), hess.clone()
        list(EAGER.subtract_noise(other, learned, grad, words, options))
        assert run.subtract_noise(theta, hess, grad, words, options)
        assert_same([theta, hess, theta], [other, learned, mean], rtol=1e-5)
        # A factor that the host does not know, and no gradient.
        kept, scale = learned.clone(), torch.tensor(0.5, device=DEVICE)
        for given in (grad, None):
            again, h = held.clone(), kept.clone()
            expected_theta, expected_hess = held.clone(), kept.clone()
            run.subtract_noise(again, h, given, words, options._replace(factor=scale))
            list(EAGER.subtract_noise(expected_theta, expected_hess, given, words, options._replace(factor=scale)))
            assert_same([again, h], [expected_theta, expected_hess], rtol=1e-5)


@pytest.mark.parametrize("clip_radius", [0.3, sys.float_info.max])
@pytest.mark.parametrize(("price", "average"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_updates_with_every_option(run, price, average, clip_radius, dtypes):
    """A machine with a GPU must train the same model as one without."""
    options = UpdateOptions(100.0, 1e-3, 0.9, 0.99, 0.1, clip_radius, 0.1, 3.0, price, average)
    for size in SIZES:
        for with_curvature, with_prior in ((True, False), (True, True), (False, False)):
            mean, grad, curvature, momentum, hess, prior = numbers(size, 6)
            curvature -= 50.0  # much of it; the Hessian stays positive, or at its least
            grad, momentum = grad.to(dtypes[0]), momentum.to(dtypes[1])
            given = [mean, grad, curvature if with_curvature else None, momentum, hess]
            given.append(prior if with_prior else None)
            expected = [None if t is None else t.clone() for t in given]
            run.update(tuple(given), options)
            passes.update(*expected, *options)
            for i in (0, 3, 4):
                tolerance = BF16_TOLERANCE if given[i].dtype == torch.bfloat16 else 1e-5
                assert_same([given[i]], [expected[i]], rtol=tolerance, atol=1e-5)


def test_a_weight_without_number_stays_so(run):
    """A training that has gone wrong must be seen, not go on from a bound."""
    options = UpdateOptions(100.0, 1e-3, 0.9, 0.99, 0.1, 1.0, 0.1, 1.0, True, False)
    mean, grad, curvature, momentum, hess, _ = numbers(4, 6)
    grad[0], curvature[1] = torch.nan, torch.nan
    run.update((mean, grad, curvature, momentum, hess, None), options)
    assert mean.isnan().tolist() == [True, True, False, False]
    assert hess.isnan().tolist() == [False, True, False, False]


def test_draws_are_as_exact_as_in_python(run):
    """Another logarithm and other roundings are fine, a worse approximation is not."""
    size, words = 2**20, philox.noise_words((5,), 3)
    drawn, mean, hess = (torch.full((size,), value, device=DEVICE) for value in (0.0, 0.0, 1.0))
    run.sample(drawn, mean, hess, words, 1.0, 0.0)
    errors = errors_of_draws(drawn.cpu(), words)
    assert errors[0].max() < 1.5 * errors[1].max() < 1e-5
    assert errors[0].mean() < 1.5 * errors[1].mean() < 1e-6


def test_writes_are_counted(run):
    """Autograd would not notice that a weight which it has saved was written to."""
    mean, grad, product, momentum, hess, other = numbers(8, 6)
    words, options = philox.noise_words((1,), 1), UpdateOptions(9.0, 0.1, 0.9, 0.9, 0.1, 1.0, 0.1, 1.0, True, False)
    for changed, call in (
        ([mean], lambda: run.sample(mean, other, hess, words, 9.0, 0.1)),
        ([mean, other], lambda: run.take_product(mean, other, grad, 1.0, False)),
        ([other], lambda: run.adopt(mean, other)),
        ([mean, hess], lambda: run.subtract_noise(mean, hess, grad, words, NoiseOptions(9.0, 0.1, 0.9, 1.0, True))),
        ([mean, momentum, hess], lambda: run.update((mean, grad, product, momentum, hess, None), options)),
    ):
        before = [t._version for t in changed]
        assert call()
        assert [t._version - version for t, version in zip(changed, before, strict=True)] == [1] * len(changed)


def test_after_a_failure_nothing_is_changed_and_it_is_said_once(monkeypatch, caplog):
    """Triton's errors are of many kinds, of its compiler, a driver, or a version that does not fit torch's."""
    broken = TritonPasses()

    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("ptxas died\nand a long trace")

    monkeypatch.setattr(broken._kernels, "sample", Kernel())
    theta, mean, hess = numbers(8, 3)
    before = theta.clone()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not broken.sample(theta, mean, hess, philox.noise_words((1,), 1), 9.0, 0.1)
    assert not broken.take_product(theta, mean, hess, 1.0, False)
    assert torch.equal(theta, before)
    [record] = caplog.records
    assert "could not be run by Triton (ptxas died)" in record.message


@pytest.mark.parametrize("contexts", [1, 2])
def test_a_failure_in_the_middle_of_a_step_changes_nothing(contexts, monkeypatch):
    """A kernel is compiled when it is first needed, which may be at any point of a training."""
    launches = [0]

    def train(fails_at):
        broken, start, launches[0] = TritonPasses(), TritonPasses._start, 0

        def fail(*args):
            launches[0] += 1
            if launches[0] > fails_at:
                raise RuntimeError("no")
            start(*args)

        monkeypatch.setattr(broken, "_start", lambda *args: fail(broken, *args))
        monkeypatch.setattr(execution, "fused_passes", lambda device_type: None if broken.failed else broken)
        params = [torch.nn.Parameter(t) for size in (2**15, 10, 3) for t in numbers(size, 1)]
        optimizer = IVON(params, lr=0.1, ess=50.0, fused=True)
        for _ in range(contexts):
            with optimizer.sampled_params(train=True):
                sum((p.square() + p.sin()).sum() for p in params).backward()
        optimizer.step()
        return torch.cat([t.detach() for p in params for t in (p, optimizer.state[p]["hess"])])

    expected = train(10**6)
    total = launches[0]
    assert total >= 6
    for fails_at in range(total):
        assert_same([train(fails_at)], [expected], rtol=1e-4, atol=1e-5)


def test_each_stream_has_its_own_tables(run, monkeypatch):
    """A kernel in another stream would not wait for its table, and write wherever the memory's last contents say."""
    tables = []
    monkeypatch.setattr(run, "_start", lambda kernel, programs, *arguments: tables.append(arguments[:3]))
    total, grad = numbers(1000, 2)
    for stream in (1, 2, 1):
        monkeypatch.setattr(triton_passes, "_stream", lambda device, stream=stream: stream)
        assert run.square(total, grad, 1.0, False)
    first, second, again = tables
    assert all(a is not b and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a is b for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("wrong", ["take_product", "square"])
def test_wrong_passes_are_not_used(wrong, monkeypatch):
    """Compilers have bugs; silently wrong weights would be the worst of results."""
    monkeypatch.setattr(TritonPasses, wrong, lambda self, *args: True)
    with pytest.raises(ArithmeticError, match="other numbers than the eager ones"):
        fused_passes.check(TritonPasses(), DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are compiled")
def test_the_interpreter_is_not_given_addresses_of_a_gpu(run):
    """Who looks for a mistake in other kernels with TRITON_INTERPRET=1 would get a crash of the process."""
    assert run.interpreted
    assert fused_passes.quick_passes("cuda") is None


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are compiled")
def test_masks_hold_a_truth_value_for_each_place(run, monkeypatch):
    """Triton's interpreter fails from 3.9 on if a mask is one truth value for all; before it took such for numbers."""
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    found = set()

    def watched(name, place):
        original = getattr(builder, name)

        def call(self, *args, **kwargs):
            found.add((name, str(args[place].data.dtype)))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(builder, name, call)

    watched("create_masked_load", 1)
    watched("create_masked_store", 2)
    a, b, c, d, e, f = numbers(8, 6)
    words, options = philox.noise_words((1,), 1), UpdateOptions(9.0, 0.1, 0.9, 0.9, 0.1, 1.0, 0.1, 1.0, True, False)
    run.sample(a, b, c, words, 9.0, 0.1)
    run.subtract_noise(a, c, None, words, NoiseOptions(9.0, 0.1, 0.9, 1.0, True))
    run.take_product(a, b, d, 1.0, False)
    run.add_product(e, a, b, d, 1.0)
    run.square(e, d, 1.0, True)
    run.adopt(a, b)
    run.update((a, d, b, e, c, f), options)
    assert not run.failed
    assert found == {("create_masked_load", "bool"), ("create_masked_store", "bool")}


def test_without_triton_another_way_is_taken(monkeypatch):
    """Wheels of torch for Windows come without."""
    monkeypatch.setitem(sys.modules, "hf_ivon.triton_kernels", None)
    monkeypatch.delattr("hf_ivon.triton_kernels")
    fused_passes._make_triton.cache_clear()
    try:
        assert fused_passes.quick_passes("cuda") is None
    finally:
        fused_passes._make_triton.cache_clear()


@pytest.mark.parametrize("target", [("cuda", "80", "32"), ("cuda", "90", "32"), ("hip", "gfx942", "64")])
def test_kernels_compile_for_gpus_and_touch_each_buffer_once(target, tmp_path):
    """What the interpreter runs need not compile; and where memory is the limit, a second read is a third more time.

    Nor may numbers be compiled in, which schedules change in every step.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels", *target]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    names = "sample", "subtract_noise", "take_product", "add_product", "square", "adopt", "update"
    assert result["variants"] == dict.fromkeys(names, 1)
    if target[0] == "cuda":
        assert set(result["roundings"]) == {"rn"}  # to the nearest
        # Bytes that are read and written for each weight.
        assert result["moved"] == {
            "sample": [8, 8],
            "subtract_noise": [12, 8],
            "take_product": [12, 8],
            "add_product": [16, 4],
            "square": [8, 4],
            "adopt": [6, 4],
            "update": [24, 12],  # four of a prior mean, which are left out where there is none
        }
