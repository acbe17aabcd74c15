"""The merging rules on unusual tensors: without dimensions, empty, wider or narrower than fp32, or no numbers."""

import math

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from safetensors.torch import load_file, save_file

from hf_ivon import Posterior, PosteriorConfig, load_posterior, save_posterior
from hf_ivon.mean import mean_digest
from hf_ivon.merge import merge, methods, report

METHODS = ("uncertainty", "gaussian", "fisher", "average", "task-arithmetic", "ties", "dare")


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(directory, tensors):
    """Save tensors as a model with a posterior."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    variance = {n: 0.001 + 0.01 * torch.rand(t.shape) for n, t in tensors.items()}
    config = PosteriorConfig(100.0, 1e-3, 0.5, 100, None, 1, (0.9, 0.99), "ivon-price", mean_digest(tensors))
    save_posterior(Posterior(variance, config), directory)
    return str(directory)


def trio(tmp_path, make):
    """Save a base and two models, each of what `make` returns for a seed."""
    return [model(tmp_path / name, make(seed)) for seed, name in enumerate(("base", "a", "b"))]


@pytest.mark.parametrize("method", METHODS)
def test_tensors_without_dimensions(tmp_path, method):
    """CLIP's logit scale is a number: the rules that weigh by posteriors ended in an IndexError."""
    base, *models = trio(
        tmp_path, lambda s: {"w": random(s, 3, 4), "scale": random(s, 1)[0], "none": torch.zeros(0, 2)}
    )
    merge(models, tmp_path / "out", base_model=base, method=method)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["scale"].shape == ()
    assert math.isfinite(found["scale"])
    if method == "gaussian":
        assert load_posterior(tmp_path / "out").variance["scale"].shape == ()


def test_of_a_matrix_weights_are_looked_at_and_not_rows():
    """The report's spread of trust was that of the first row, which of an embedding is the padding."""
    statistics = report.TensorStatistics(1)
    trust = torch.full((64, 640), 4.0)
    trust[0] = 1e6
    zeros = torch.zeros_like(trust)
    statistics.add(zeros, [zeros], [trust], [1.0])
    typical = statistics.summary([1.0])["trust_typical"][0]
    assert typical == pytest.approx(math.exp((63 * math.log(4) + math.log(1e6)) / 64), rel=1e-4)


def test_only_empty_tensors(tmp_path):
    """There is no average Hessian of no weights: "slice step cannot be zero"."""
    base, *models = trio(tmp_path, lambda s: {"none": torch.zeros(0, 4)})
    for file in (tmp_path / "base").glob("posterior*"):
        file.unlink()
    merge(models, tmp_path / "out", base_model=base, method="uncertainty")
    assert load_file(tmp_path / "out" / "model.safetensors")["none"].shape == (0, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_can_be_merged(tmp_path, dtype, method):
    """What is saved in 8 bits ended in "not implemented for 'Float8_e4m3fn'"."""
    base, *models = trio(tmp_path, lambda s: {"w": random(s, 30, 40, dtype=dtype)})
    merge(models, tmp_path / "out", base_model=base, method=method)
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert found.dtype == dtype
    if method == "average":
        a, b = (load_file(f"{m}/model.safetensors")["w"].double() for m in models)
        assert torch.equal(found, ((a + b) / 2).float().to(dtype) if dtype != torch.float64 else (a + b) / 2)


def test_what_8_bits_do_not_hold_is_an_error(tmp_path):
    """They end at 448, and have no inf that would show what was cut off."""
    base, *models = trio(tmp_path, lambda s: {"w": torch.full((3,), 200.0 * s).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match="merge of `w` is too large for float8_e4m3fn"):
        merge(models, tmp_path / "out", base_model=base, method="task-arithmetic")


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_kept_tensor_must_fit_too(tmp_path, own):
    """A head of one model went into fp16 as inf, without a word; bf16 is as small, and reaches much further."""
    for name, rows in (("a", 2), ("b", 3)):
        model(tmp_path / name, {"enc": random(1, 4, dtype=own), "head": torch.full((rows, 4), 1e5, dtype=own)})
    names = [tmp_path / "a", tmp_path / "b"]
    settings = {"method": "average", "heads": "keep:a"}
    with pytest.raises(ValueError, match="merge of `head` is too large for float16"):
        merge(names, tmp_path / "out", dtype=torch.float16, **settings)
    merge(names, tmp_path / "wide", dtype=torch.float32, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_nan_in_a_kept_tensor_is_named(tmp_path, value, dtype):
    """The merge looked whole, and predicted NaN."""
    for name, rows in (("a", 2), ("b", 3)):
        values = {"enc": random(1, 4), "head": torch.full((rows, 4), math.nan if dtype.itemsize == 1 else value)}
        model(tmp_path / name, {"enc": values["enc"], "head": values["head"].to(dtype)})
    with pytest.raises(ValueError, match="The tensor `head` of .*a holds NaN or inf. Check that model"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="average", heads="keep:a")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["uncertainty", "task-arithmetic", "ties", "dare"])
def test_nan_in_the_base_is_named(tmp_path, method, value):
    """ "Pass smaller weights" sent the user to the wrong place."""
    base, *models = trio(tmp_path, lambda s: {"w": torch.full((3,), value) if s == 0 else random(s, 3)})
    with pytest.raises(ValueError, match="The tensor `w` of .*base holds NaN or inf. Check that model"):
        merge(models, tmp_path / "out", base_model=base, method=method)


def test_ties_of_fp64_is_pefts(tmp_path):
    """Small differences of wide weights were lost when they were rounded to fp32 before they were subtracted: the
    thresholds were of round-off, and too few differences were kept."""
    start = random(0, 1000).double()
    # what the files hold, and so what is subtracted
    parts = [start + 1e-9 * random(s, 1000).double() for s in (1, 2)]
    for name, values in zip(("base", "a", "b"), (start, *parts), strict=True):
        model(tmp_path / name, {"w": values})
    for density in (0.2, 1.0):
        out = tmp_path / f"out{density}"
        merge([tmp_path / "a", tmp_path / "b"], out, base_model=tmp_path / "base", method="ties", density=density)
        expected = peft_ties([p - start for p in parts], torch.ones(2, dtype=torch.float64), density)
        found = load_file(out / "model.safetensors")["w"]
        assert torch.equal(found, start + expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_any_hessian_the_base_stays(dtype):
    """In 16 bits the smallest number of fp32 is 0, and the rule gave NaN."""
    base, none = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    found = methods.uncertainty(base, [3 * base, 5 * base], [none, none], none[0], [1.0, 2.0])
    assert torch.equal(found, base)


def test_ties_without_votes_is_an_error():
    """An error about stacking nothing does not name the weights."""
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"`weights` must not all be 0, got \[0.0, 0.0\]"):
        methods.ties(one, [one, one], [0.0, 0.0], [0.0, 0.0])


@pytest.mark.parametrize(
    "rule",
    [
        lambda one: methods.gaussian([one, one], [one], [1.0]),
        lambda one: methods.gaussian([one], [one, one], [1.0]),
        lambda one: methods.gaussian([one, one], [one], [1.0, 2.0]),
        lambda one: methods.fisher([one, one], [one], [1.0]),
        lambda one: methods.fisher([one], [one, one], [1.0]),
        lambda one: methods.fisher([one], [one], [1.0, 2.0]),
        lambda one: methods.ties(one, [one, one], [1.0, 1.0], [0.0]),
    ],
)
def test_lists_of_different_lengths_are_an_error(rule):
    """With one weight all models but the first were left out without a word."""
    with pytest.raises(ValueError, match="`weights` must be one per model, got"):
        rule(torch.ones(1))
