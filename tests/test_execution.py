"""Plain, packed and fused passes do the same; how much memory they hold; and training without compilers."""

import logging
import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from hf_ivon import compiled, execution, fused_passes, native, passes, philox, sampling
from hf_ivon.native import Native
from hf_ivon.optim import IVON
from hf_ivon.packs import MAX_ELEMENTS
from hf_ivon.triton_passes import TritonPasses

COMPILED_SIZE = MAX_ELEMENTS


@contextmanager
def fresh_passes():
    """Have the fused passes made anew, here and afterwards."""
    made = fused_passes._make_native, fused_passes._make_triton, fused_passes._make_compiled
    for function in made:
        function.cache_clear()
    try:
        yield
    finally:
        for function in made:
            function.cache_clear()


def no_native():
    raise OSError("no C++ compiler found")


@pytest.fixture(scope="module")
def compiled_passes():
    """The passes as accelerators have them, compiled once for all tests."""
    with pytest.MonkeyPatch.context() as patch, fresh_passes():
        patch.setattr(native, "build", no_native)
        return execution.fused_passes("cpu")


@pytest.fixture(scope="module")
def triton_passes():
    """The passes as GPUs have them, here run by Triton's interpreter."""
    pytest.importorskip("triton")
    run = TritonPasses()
    if not run.interpreted:
        pytest.skip("Triton's kernels run on the GPU here, see test_triton_passes.py")
    fused_passes.check(run, "cpu")
    return run


COMPILER = pytest.mark.compiler


@pytest.fixture(
    params=["eager", pytest.param("native", marks=COMPILER), "triton", pytest.param("compiled", marks=COMPILER)]
)
def fused(request, monkeypatch):
    """Option `fused` of an optimizer that takes its passes in each of the ways."""
    if request.param in ("compiled", "triton"):
        kept = request.getfixturevalue(f"{request.param}_passes")
        monkeypatch.setattr(execution, "fused_passes", lambda device_type: kept)
    return request.param != "eager"


def make_params(seed=0):
    """Tensors for each way: one that is compiled, one that is not a multiple of four, and some for a pack."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((COMPILED_SIZE // 64, 64), (COMPILED_SIZE + 1,), (10,), (), (3, 5), (1,), (COMPILED_SIZE - 1,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(params, optimizer, steps=3, contexts=1, weight=1.0):
    """Minimize a function whose gradient depends on the weights."""
    for step in range(steps):
        optimizer.zero_grad()
        for context in range(contexts):
            with optimizer.sampled_params(train=True, weight=weight):
                sum(((1 + step + context) * p.square() + p.sin()).sum() for p in params).backward()
        optimizer.step()


def results(params, optimizer):
    tensors = {"mean": [p.detach() for p in params]}
    for name in ("momentum", "hess"):
        tensors[name] = [optimizer.state[p][name] for p in params]
    return tensors


def run(contexts=1, weight=1.0, **options):
    params = make_params()
    optimizer = IVON(params, lr=0.02, ess=50.0, hess_init=0.5, beta2=0.99, weight_decay=1e-2, **options)
    train(params, optimizer, contexts=contexts, weight=weight)
    return results(params, optimizer)


OPTIONS = {
    "default": {},
    "clip": {"clip_radius": 1e-2},
    "prior": {"prior_mean": "init"},
    "gradsq": {"hess_approx": "gradsq"},
    "fisher": {"hess_approx": "fisher", "batch_size": 16.0},
    "accumulation": {"contexts": 3},
    "weight": {"weight": 0.25},
}


@pytest.mark.parametrize(
    ("fused", "name"),
    [(way, name) for way in ("eager", "triton") for name in OPTIONS]
    + [pytest.param("native", name, marks=COMPILER) for name in OPTIONS]
    # Each of the others compiles the passes once more.
    + [pytest.param("compiled", n, marks=[COMPILER, *[pytest.mark.slow] * (n != "default")]) for n in OPTIONS],
    indirect=["fused"],
)
def test_the_ways_to_run_agree(fused, name):
    """A machine with a compiler must train the same model as one without: nobody could find such a difference."""
    options = OPTIONS[name]
    expected = run(foreach=False, fused=False, **options)
    got = run(foreach=True, fused=fused, **options)
    for part in expected:
        for a, b in zip(got[part], expected[part], strict=True):
            # Draws near zero differ in their last bits, and the small Hessians of some weights enlarge that.
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5, msg=lambda m, n=part: f"{n}: {m}")


@COMPILER
@pytest.mark.parametrize("fused", ["native", "compiled"], indirect=True)
@pytest.mark.parametrize("contexts", [1, 2])
def test_weights_in_bf16_are_trained_by_fused_passes(fused, contexts, monkeypatch):
    """Their means are kept apart; that must be no reason for the slow way, nor for another result."""
    ends = []
    assert execution.fused_passes("cpu") is not None  # and has been compared with the eager ones
    for option in (False, fused):
        if option:  # what is not fused fails
            monkeypatch.setattr(passes, "add_product", None)
            monkeypatch.setattr(execution, "normal_range", None)
        p = nn.Parameter(torch.linspace(-1, 1, COMPILED_SIZE).bfloat16())
        optimizer = IVON([p], lr=0.02, ess=50.0, hess_init=0.5, beta2=0.99, fused=option)
        train([p], optimizer, contexts=contexts)
        ends.append(torch.cat([optimizer.posterior_mean(p), optimizer.state[p]["hess"]]))
    # A weight sample in bf16 may be rounded the other way, by 0.4% of it, and its gradient with it.
    difference = (ends[0] - ends[1]).abs()
    assert difference.max() < 1e-2
    assert difference.mean() < 1e-4


def test_the_mean_comes_back_bit_for_bit_whatever_the_way(fused):
    """Every sample would leave a trace in the weights."""
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = IVON(params, lr=0.1, ess=50.0, fused=fused)
    for kind in (True, False):
        with optimizer.sampled_params(train=kind):
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            if kind:
                sum(p.square().sum() for p in params).backward()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


FUSED = [pytest.param("native", marks=COMPILER), "triton", pytest.param("compiled", marks=COMPILER)]


@pytest.mark.parametrize("fused", FUSED, indirect=True)
def test_fused_passes_were_really_taken(fused, monkeypatch):
    """Tests of the fused ways would otherwise test the eager one four times."""
    run = execution.fused_passes("cpu")
    sizes = []

    def update(tensors, options):
        sizes.append(tensors[0].numel())
        return type(run).update(run, tensors, options)

    def update_all(tensors, options):
        sizes.extend(t[0].numel() for t in tensors)
        return type(run).update_all(run, tensors, options)

    def update_pack(pack, *args):
        sizes.append(pack.starts[-1])
        return type(run).update_pack(run, pack, *args)

    monkeypatch.setattr(run, "update", update)
    monkeypatch.setattr(run, "update_all", update_all, raising=False)
    monkeypatch.setattr(run, "update_pack", update_pack, raising=False)
    params = make_params()
    optimizer = IVON(params, lr=0.1, ess=50.0, fused=True)
    train(params, optimizer, steps=1)
    assert sizes == [params[0].numel(), params[1].numel(), sum(p.numel() for p in params[2:])]


def test_momentum_in_bf16(fused):
    """The option would be without effect, lose the step to rounding, or a resumed run would go another way."""
    ends = {}
    for dtype in ("float32", "bfloat16", "resumed"):
        params = make_params()
        options = {"lr": 0.02, "ess": 50.0, "hess_init": 0.5, "beta2": 0.99, "fused": fused}
        optimizer = IVON(params, **options, momentum_dtype="float32" if dtype == "float32" else "bfloat16")
        train(params, optimizer, steps=2)
        if dtype == "resumed":
            saved, optimizer = optimizer.state_dict(), IVON(params, **options)
            optimizer.load_state_dict(saved)
        train(params, optimizer, steps=2)
        kinds = [optimizer.state[p]["momentum"].dtype for p in params]
        assert kinds[0] == (torch.float32 if dtype == "float32" else torch.bfloat16)
        assert set(kinds[2:]) == {torch.float32}, "small tensors lie in packs"
        ends[dtype] = torch.cat([p.detach().flatten() for p in params])
    assert torch.equal(ends["bfloat16"], ends["resumed"])
    moved = (ends["float32"] - torch.cat([p.detach().flatten() for p in make_params()])).abs()
    difference = (ends["float32"] - ends["bfloat16"]).abs()
    assert 0 < difference.max() < 0.01 * moved.max()  # bf16 has 8 bits: 0.4% in each of four steps at most


@COMPILER
@pytest.mark.parametrize("fused", ["native", "compiled"], indirect=True)
def test_shapes_are_not_compiled_in_and_writes_are_counted(fused):
    """Weights of many ranks would be compiled once each; autograd would not notice a weight that is written to."""
    shapes = [(COMPILED_SIZE,), (2, COMPILED_SIZE // 2), (2, 4, COMPILED_SIZE // 8), (2, 2, 4, COMPILED_SIZE // 16)]
    counts = []
    for shape in shapes:
        p = nn.Parameter(torch.ones(shape))
        optimizer = IVON([p], lr=0.1, ess=50.0, fused=True)
        train([p], optimizer, steps=1)
        before = p._version
        train([p], optimizer, steps=1)
        assert p._version > before
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1:] == counts[:-1]
    assert execution.fused_passes("cpu") is not None


@torch._inductor.config.patch(force_disable_caches=True)  # code from the cache comes without the guards on numbers
@COMPILER
@pytest.mark.parametrize("fused", ["compiled"], indirect=True)
def test_numbers_that_change_are_not_compiled_in(fused):
    """Every step of a schedule, or every trial of a sweep, would compile anew, and after eight fall back to eager."""
    torch._dynamo.reset()
    trials = [{"lr": 0.1 / (i + 1), "clip_radius": 0.1 / (i + 1), "beta1": 0.5 + i / 50} for i in range(10)]
    trials[3]["clip_radius"] = float("inf")
    trials += [{"ess": 50 + i, "weight_decay": 1e-3 / (i + 1), "beta2": 0.9 + i / 200} for i in range(10)]
    counts = []
    for estimator in ("price", "fisher"):
        for trial in trials:
            params = [nn.Parameter(torch.ones(COMPILED_SIZE))]
            options = {"lr": 0.1, "ess": 50.0, "hess_approx": estimator, "batch_size": 2.0, "fused": True, **trial}
            train(params, IVON(params, **options), steps=2)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert execution.fused_passes("cpu") is not None
    assert counts[1:20] == [counts[1]] * 19
    assert counts[21:] == [counts[21]] * 19


def test_without_a_compiler_training_goes_on_with_one_warning(monkeypatch, caplog):
    """`python:3.11-slim` has no C++ compiler; a person there needs to know, and to train."""
    expected = run(fused=False)

    def no_compiler(*args, **kwargs):
        def fail(*args):
            raise RuntimeError("no working C++ compiler found\nand a long trace")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(native, "build", no_native)
    with caplog.at_level(logging.WARNING), fresh_passes():
        got = run(fused=True)
    assert all(torch.equal(a, b) for name in expected for a, b in zip(got[name], expected[name], strict=True))
    assert [r.message for r in caplog.records] == [
        "IVON's passes over the weights could not be compiled (no working C++ compiler found). They run eagerly "
        "instead: the same numbers, more slowly. Install a C++ compiler such as g++, or pass `fused=False` to be "
        "silent."
    ]


def test_compiled_passes_that_are_wrong_are_not_used(monkeypatch, caplog):
    """Compilers have bugs; silently wrong weights would be the worst of results."""

    def wrong(function, **kwargs):
        return (lambda *args: None) if function.__name__ == "take_product" else function

    monkeypatch.setattr(torch, "compile", wrong)
    monkeypatch.setattr(Native, "update", lambda *args: True)
    with fresh_passes():
        assert execution.fused_passes("cpu") is None
    assert "give other numbers than the eager ones" in caplog.text


@COMPILER
def test_a_compiled_pass_that_does_not_round_means_is_not_used(monkeypatch, caplog):
    """Compilers leave roundings out; every mean would differ from its weight then, and be lost to bf16."""
    p = nn.Parameter(torch.ones(2 * COMPILED_SIZE, dtype=torch.bfloat16))
    with fresh_passes():
        monkeypatch.setattr(Native, "adopt", lambda self, theta, mean: bool(mean.copy_(theta).numel()))
        optimizer = IVON([p], lr=0.1, ess=1e8, fused=True)
        train([p], optimizer, steps=1)
        kept = optimizer.posterior_mean(p)
        assert not torch.equal(kept, kept.bfloat16().float())
        assert torch.equal(optimizer.posterior_mean(p), kept)
    assert "rounds in another way" in caplog.text


@pytest.mark.parametrize(("dtype", "together"), [(torch.bfloat16, [3]), (torch.float16, [1, 1, 1])])
def test_gradients_that_are_cast_are_so_one_after_another(dtype, together, monkeypatch):
    """All in fp32 at once would be a second copy of the model, which may not have room; bf16 needs none at all."""
    params = [nn.Parameter(torch.ones(COMPILED_SIZE, dtype=dtype)) for _ in range(3)]
    optimizer, updates, update = IVON(params, lr=0.1, ess=1e6, fused=True), [], execution.Execution.update
    monkeypatch.setattr(
        execution.Execution,
        "update",
        lambda self, items, options: updates.append(items) or update(self, items, options),
    )
    train(params, optimizer, steps=1)
    assert [len(items) for items in updates] == together
    assert {item[1].dtype for items in updates for item in items} == {
        torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    }
    assert optimizer.posterior_mean(params[2]).sub(1).abs().min() > 0


def held(optimizer):
    """All tensors that the optimizer holds on to, in elements; each storage once."""
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    tensors += list(optimizer._capture.products._sums.values()) + list(optimizer._sampler.means.values())
    tensors += [t for spare in optimizer._sampler._spare.values() for t in spare]
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values())


@pytest.mark.parametrize(("contexts", "copies"), [(1, 3), (4, 4)])
def test_memory_is_one_buffer_more_than_adam_and_one_for_accumulation(contexts, copies):
    """A model that fits with AdamW must not fail to fit for a forgotten buffer."""
    p = nn.Parameter(torch.ones(200, 200))
    optimizer = IVON([p], lr=0.1, ess=50.0)
    most = []
    p.register_post_accumulate_grad_hook(lambda p: most.append(held(optimizer)))
    train([p], optimizer, contexts=contexts)
    most.append(held(optimizer))
    assert max(most) == copies * p.numel() + 1  # one for the number of steps


def test_gradients_clipped_inside_the_block_are_noticed_and_then_kept_out_of_the_hessian(caplog):
    """Clipped gradients bias the Hessian; the first step shows it, and the next ones must not have it."""
    p = nn.Parameter(torch.ones(30_000))
    optimizer = IVON([p], lr=0.1, ess=50.0, beta2=0.5)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                p.square().sum().backward()
                theta, grad = p.detach().clone(), p.grad.clone()
                p.grad.mul_(0.1)
            product = grad * (theta - p.detach())
            torch.testing.assert_close(optimizer._capture.products.curvature(p), product * (0.1 if step == 0 else 1.0))
            optimizer.step()
    assert [r.message for r in caplog.records if "changed inside" in r.message] == [caplog.records[0].message]


@pytest.mark.parametrize("hess_approx", ["gradsq", "fisher"])
def test_gradients_clipped_inside_the_block_are_said_to_change_their_squares(caplog, hess_approx):
    """The Hessian would be a hundred times too small in every step, and so the noise ten times too wide, silently."""
    p = nn.Parameter(torch.ones(30))
    optimizer = IVON([p], lr=0.1, ess=50.0, hess_approx=hess_approx, batch_size=1.0, weight_decay=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.sampled_params(train=True):
                p.square().sum().backward()
                p.grad.mul_(0.1)
            optimizer.step()
    assert ["squares of the changed ones" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_past_autograd_to_narrow_weights_is_their_mean(fused, dtype):
    """`p.data.copy_(average)`, as libraries for averaged weights write it, changes no version."""
    p = nn.Parameter(torch.ones(2 * COMPILED_SIZE, dtype=dtype))
    optimizer = IVON([p], lr=0.1, ess=1e8, fused=fused)
    train([p], optimizer, steps=1)
    kept = optimizer.posterior_mean(p)[0]
    p.data[1:] = 5.0
    with optimizer.sampled_params():
        assert (p[1:] - 5.0).abs().max() < 0.1
    mean = optimizer.posterior_mean(p)
    assert torch.equal(mean, torch.full_like(mean, 5.0).index_fill(0, torch.tensor([0]), kept.item()))
    assert torch.equal(p, mean.to(dtype))


@COMPILER
@pytest.mark.parametrize("fused", ["native", "compiled"], indirect=True)
def test_a_shard_has_its_part_of_the_noise_where_passes_are_fused(fused, monkeypatch):
    """Counted from the shard's beginning, all processes would draw the same noise for different weights."""
    p = nn.Parameter(torch.zeros(4 * COMPILED_SIZE))
    half = p.numel() // 2
    monkeypatch.setattr(
        sampling.distributed, "local", lambda t: t.detach()[half:] if t.numel() == p.numel() else t.detach()
    )
    monkeypatch.setattr(sampling.distributed, "shard_start", lambda t: half)
    sampler = sampling.WeightSampler(execution.Execution(None, True))
    group = {"ess": 1.0, "weight_decay": 0.0}
    sampler.perturb({}, [sampling.Draw(p, group, {"hess": torch.ones(p.shape)}, (1, 2), 3)], train=True)
    words = philox.noise_words((1, 2), 3)
    torch.testing.assert_close(p.detach()[half:], philox.normal_range(half, p.numel(), p.numel(), words))


@COMPILER
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_loops_run_in_the_threads_of_their_call(threads, monkeypatch):
    """Decided by the first call, as the compiler does, a pass over any model runs in one thread: twice the time.

    The first call is the comparison with the eager passes, on few numbers, in as many threads as there happen to be.
    """
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch._dynamo.reset()
    function = compiled.compile_pass(compiled.with_options(passes.take_product))
    _, [code] = run_and_get_code(function, tuple(torch.rand(3, 96)), torch.ones(1, dtype=torch.float64), False)
    assert re.findall(r"#pragma omp parallel.*", code) == ["#pragma omp parallel"]


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize(
    ("name", "reads", "writes"),
    [("sample", 8, 8), ("take_product", 3, 2), ("update", 5, 3)],
)
def test_a_compiled_pass_is_one_loop_without_temporaries(name, reads, writes):
    """Each further loop or buffer moves the whole model through memory once more, and nobody would see why.

    Reads and writes count streams of the loop; the sample has four lanes, each of which reads two tensors (weights and
    Hessian) and writes two (mean and weights).
    """
    from torch._inductor.utils import run_and_get_code

    a, b, c, d, e = (torch.rand(2**16) + 0.1 for _ in range(5))
    lanes = [compiled.apart(t) for t in (a, b, c)]
    tensors, numbers, *flags = {
        "sample": ((*lanes, philox.noise_words((1,), 0)), (10.0, 1e-3), True),
        "take_product": ((a, b, c), (1.0,), False),
        "update": ((a, b, c, d, e, None), (10.0, 1e-3, 0.9, 0.999, 0.1, 1.0, 0.1, 1.0), True, False),
    }[name]
    torch._dynamo.reset()
    function = {"sample": compiled.sample_whole, "take_product": passes.take_product, "update": passes.update}[name]
    options = compiled.on_device(numbers, a.device)
    _, [code] = run_and_get_code(compiled.compile_pass(compiled.with_options(function)), tensors, options, *flags)
    assert code.count("async_compile.cpp_pybinding(") == 1
    assert "empty_strided_cpu(" not in code.split("def call(")[1]
    kernel = code[code.index('extern "C"') : code.index("async_compile.wait")]
    assert len(set(re.findall(r"Vectorized<float>::loadu\((\w+) ", kernel))) == reads
    assert len(set(re.findall(r"\.store\((\w*out_ptr\d+) ", kernel))) == writes
