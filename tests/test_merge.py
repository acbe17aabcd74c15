"""Merging checkpoints: the rules, the files, and what is said about input that cannot be merged."""

import json
import math
import re
import shutil
import time
import weakref

import peft
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel
from typer.testing import CliRunner

from hf_ivon import Posterior, PosteriorConfig, load_posterior, save_posterior
from hf_ivon.cli.main import app
from hf_ivon.cli.merge import spread
from hf_ivon.mean import mean_digest, posterior_keys
from hf_ivon.merge import engine, merge, methods, rules
from hf_ivon.merge import hessians as hessians_module
from hf_ivon.merge.plan import make_plan
from tests import tiny

SIZES = (100, 300, 50)  # training examples of the models
DELTA = 1e-3


def posterior_of(model, num_examples, generator, steps=5, weight_decay=DELTA):
    """A posterior with a Hessian that differs from weight to weight, λ twice N."""
    params = {k: p for k, p in posterior_keys(model).items() if p.requires_grad}
    hess = {k: torch.rand(p.shape, generator=generator) + 0.01 for k, p in params.items()}
    ess = 2.0 * num_examples
    config = PosteriorConfig(
        ess=ess, weight_decay=weight_decay, hess_init=0.5, num_examples=num_examples, num_tokens=None, steps=steps,
        betas=(0.9, 0.99), estimator="ivon-price", mean_digest=mean_digest(params),
    )  # fmt: skip
    return Posterior({k: 1 / (ess * (h + weight_decay)) for k, h in hess.items()}, config), hess


def save(model, directory, num_examples, generator):
    model.save_pretrained(directory)
    posterior, hess = posterior_of(model, num_examples, generator)
    save_posterior(posterior, directory)
    return hess


@pytest.fixture
def models(tmp_path):
    """A base, three models finetuned from it, and their Hessians."""
    generator = torch.Generator().manual_seed(5)
    base = tiny.bert()
    base.save_pretrained(tmp_path / "base")
    hessians = []
    for name, size in zip("abc", SIZES, strict=True):
        model = tiny.bert()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        hessians.append(save(model, tmp_path / name, size, generator))
    return tmp_path, [str(tmp_path / n) for n in "abc"], hessians


def tensors(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("block", [2**22, 50])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_uncertainty_is_the_papers_equation(models, monkeypatch, weights, block):
    """Each weight must be trusted as its Hessian says, N * h of its own model; also when cut into blocks."""
    directory, names, hessians = models
    monkeypatch.setattr(rules, "_BLOCK", block)
    monkeypatch.setattr(rules, "_COMPUTE", 7 * block // 10)
    merge(names, directory / "out", base_model=directory / "base", weights=weights)
    found, base = tensors(directory / "out"), tensors(directory / "base")
    alpha = weights or [1.0] * 3
    prior = sum(n * DELTA for n in SIZES) / 3
    for key, start in base.items():
        parts = [tensors(directory / n)[key].double() for n in "abc"]
        scaled = [n * h[key].double() for n, h in zip(SIZES, hessians, strict=True)]
        moved = sum(a * (prior + h) * (p - start) for a, h, p in zip(alpha, scaled, parts, strict=True))
        expected = start + moved / (prior + sum(a * h for a, h in zip(alpha, scaled, strict=True)))
        # The Hessian comes back from an fp32 variance: its error is fp32 round-off times (h + delta) / h.
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-4, atol=1e-6)
    BertForSequenceClassification.from_pretrained(directory / "out")


def test_the_hessian_of_the_base_may_be_given(models):
    """After training with a strong prior the curvatures of the models would hardly count."""
    directory, names, _ = models
    merge(names, directory / "out", base_model=directory / "base", base_hessian=0.0)
    merge(names, directory / "fisher", method="fisher")  # which is what is left of the rule then
    for key, value in tensors(directory / "out").items():
        torch.testing.assert_close(value, tensors(directory / "fisher")[key], rtol=1e-5, atol=1e-6)
    report = merge(names, directory / "drowned", base_model=directory / "base", base_hessian=1e9)
    assert "drowns those of the models" in report["notes"][0]
    added = methods.task_arithmetic(
        tensors(directory / "base")[key], [tensors(directory / n)[key] for n in "abc"], [1.0] * 3
    )
    torch.testing.assert_close(tensors(directory / "drowned")[key], added, rtol=1e-4, atol=1e-5)
    for settings in ({"base_hessian": -1.0}, {"base_hessian": 1.0, "method": "average"}):
        with pytest.raises(ValueError, match="`base_hessian` must be a number of at least 0, for uncertainty, got"):
            merge(names, directory / "no", base_model=directory / "base", **settings)


@pytest.mark.parametrize("block", [2**22, 50])
def test_a_strong_prior_stands_back_behind_the_models(models, monkeypatch, block):
    """The finetuning preset's prior is thousands of times the data's curvature: with it a merge adds up all
    differences from the base, which is worse than plain averaging. The average Hessian is used, of all weights,
    as a few rows of an embedding may hold most of it, and the merge says so."""
    directory, names, _ = models
    monkeypatch.setattr(hessians_module, "_READ", block)
    total = weights = 0.0
    for name, size in zip(names, SIZES, strict=True):
        model = BertForSequenceClassification.from_pretrained(name)
        posterior, hess = posterior_of(model, size, torch.Generator().manual_seed(size), weight_decay=1e3)
        for key, h in hess.items():
            if h.ndim == 2:  # a frequent word
                h[1] *= 300
                posterior.variance[key] = 1 / (2 * size * (h + 1e3))
        save_posterior(posterior, name)
        total += sum(size * h.double().sum().item() for h in hess.values())
        weights += sum(h.numel() for h in hess.values())
    report = merge(names, directory / "out", base_model=directory / "base")
    used = {t["base_hessian"] for t in report["tensors"].values() if "base_hessian" in t}
    assert len(used) == 1
    assert used.pop() == pytest.approx(total / weights, rel=1e-3)  # fp32 keeps h beside delta to 1e3 * 2^-24 = 6e-5
    limit = re.escape(f"average Hessian, {total / weights:.2g}, stands for that of the base")
    assert re.search(rf"prior has the Hessian 1.5e\+05, .* {limit}", report["notes"][0])
    state = engine.merged_state_dict(make_plan(names, str(directory / "base"), method="uncertainty"))
    torch.testing.assert_close(state, tensors(directory / "out"), rtol=0, atol=0)


def test_of_very_many_weights_a_part_is_looked_at(models, monkeypatch):
    """Their average alone is wanted, and a second pass over all posteriors would take as long as the merge."""
    directory, names, _ = models
    for name, size in zip(names, SIZES, strict=True):
        model = BertForSequenceClassification.from_pretrained(name)
        save_posterior(posterior_of(model, size, torch.Generator().manual_seed(size), weight_decay=1e3)[0], name)
    plan = make_plan(names, str(directory / "base"), method="uncertainty")
    whole, read = hessians_module.limit_prior(plan).prior_limit, []
    original = hessians_module.variances_of
    monkeypatch.setattr(hessians_module, "_READ", 16)
    monkeypatch.setattr(hessians_module, "_LOOKED_AT", 2000)
    monkeypatch.setattr(hessians_module, "variances_of", lambda *args: read.append(original(*args)) or read[-1])
    found = hessians_module.limit_prior(plan).prior_limit
    count = sum(v.numel() for v in read)
    assert 1000 < count < 4000 < sum(p.numel() for p in model.parameters()) * 3
    # h is uniform with a deviation of 0.56 of its mean, times N of three sizes; five deviations of their average
    assert found == pytest.approx(whole, rel=5 * 1.1 / count**0.5)


def test_without_any_curvature_the_prior_is_all_there_is(models):
    """With a base that counts as little as the models, the merge would be the base."""
    directory, names, _ = models
    for name, size in zip(names, SIZES, strict=True):
        model = BertForSequenceClassification.from_pretrained(name)
        posterior, hess = posterior_of(model, size, torch.Generator())
        flat = {k: torch.full_like(h, 1 / (2 * size * DELTA)) for k, h in hess.items()}
        save_posterior(Posterior(flat, posterior.config), name)
    for name in names:  # what fp32 leaves of h = 1 / (ess * variance) - delta is below zero, and counts as zero
        config = json.loads((directory / name / "posterior_config.json").read_text())
        (directory / name / "posterior_config.json").write_text(json.dumps({**config, "weight_decay": 1.001 * DELTA}))
    merge(names, directory / "out", base_model=directory / "base")
    merge(names, directory / "added", base_model=directory / "base", method="task-arithmetic")
    torch.testing.assert_close(tensors(directory / "out"), tensors(directory / "added"))


def test_one_model_with_weight_1_is_itself(models):
    """To the bit, by every rule that keeps all of a model: base + (model - base) is not, in fp32."""
    directory, names, _ = models
    for method in ("uncertainty", "gaussian", "fisher", "average", "task-arithmetic"):
        based = {"base_model": directory / "base"} if method in ("uncertainty", "task-arithmetic") else {}
        merge(names[:1], directory / method, method=method, **based)
        torch.testing.assert_close(tensors(directory / method), tensors(directory / "a"), rtol=0, atol=0)
    variances, own = (load_posterior(directory / n).variance for n in ("gaussian", "a"))
    torch.testing.assert_close(variances, own, rtol=2**-23, atol=0)  # 1 / (1 / v)


def test_uncertainty_has_its_limits():
    """Equal Hessians with weights that add up to 1 average; no curvature moves nothing, not even one model."""
    generator = torch.Generator().manual_seed(0)
    base, one, two, hess = (torch.rand(50, generator=generator) + 0.1 for _ in range(4))
    nothing = torch.zeros(50)
    # a power of 2 scales what it multiplies and is divided out again without round-off: equal to the last bit
    even = torch.full((50,), 0.125)
    averaged = methods.task_arithmetic(base, [one, two], [0.25, 0.75])
    assert torch.equal(methods.uncertainty(base, [one, two], [even, even], even, [0.25, 0.75]), averaged)
    torch.testing.assert_close(
        methods.uncertainty(base, [one, two], [hess, hess], hess, [0.25, 0.75]), averaged, rtol=2**-22, atol=2**-22
    )
    assert torch.equal(methods.uncertainty(base, [one, two], [nothing, nothing], nothing, [1.0, 1.0]), base)
    assert torch.equal(methods.uncertainty(base, [one], [nothing], nothing, [1.0]), base)
    # but NaN does not hide behind a Hessian of 0: the merge looks for it in the result alone
    assert methods.uncertainty(base, [one, base / 0 * 0], [nothing, nothing], nothing, [1.0, 1.0]).isnan().all()
    # without curvature of the models, the base's alone makes it task arithmetic
    added = methods.task_arithmetic(base, [one, two], [1.0, 1.0])
    assert torch.equal(methods.uncertainty(base, [one, two], [nothing, nothing], even, [1.0, 1.0]), added)
    found = methods.uncertainty(base, [one, two], [nothing, nothing], hess, [1.0, 1.0])
    torch.testing.assert_close(found, added, rtol=2**-22, atol=2**-22)


def test_sums_over_models_hold_one_at_a_time():
    """A model is read when the rule comes to it: were all of them there at once, the cache would not hold them."""
    generator = torch.Generator().manual_seed(0)
    models, hessians = (list(torch.rand(3, 50, generator=generator)) for _ in range(2))
    base, prior, weights = torch.zeros(50), torch.tensor(0.5), [1.0, 0.5, 2.0]
    seen = []

    def read(tensors):
        for tensor in tensors:
            assert sum(ref() is not None for ref in seen) <= 3  # the model and Hessian before, and this one's model
            copy = tensor.clone()
            seen.append(weakref.ref(copy))
            yield copy
            del copy

    for rule in (
        lambda m, h: methods.average(m(models), weights),
        lambda m, h: methods.task_arithmetic(base, m(models), weights),
        lambda m, h: methods.uncertainty(base, m(models), h(hessians), prior, weights),
    ):
        assert torch.equal(rule(read, read), rule(list, list))
    with pytest.raises(ValueError, match=r"`weights` must be one per model, got 3: model 2 lacks one"):
        methods.average(models[:2], weights)
    with pytest.raises(ValueError, match=r"`weights` must be one per model, got 1: model 1 lacks one"):
        methods.task_arithmetic(base, models, [1.0])


def test_uncertainty_finds_the_joint_minimum_of_quadratics():
    """On quadratic losses the rule is exact: the merge minimizes what its derivation says."""
    generator = torch.Generator().manual_seed(1)
    base, prior = torch.randn(20, generator=generator).double(), torch.rand(20, generator=generator).double()
    curvatures = [torch.rand(20, generator=generator).double() + 0.1 for _ in range(3)]
    optima = [torch.randn(20, generator=generator).double() for _ in range(3)]
    weights = [1.0, 0.5, 2.0]
    models = [(h * o + prior * base) / (h + prior) for h, o in zip(curvatures, optima, strict=True)]
    total = prior + sum(w * h for w, h in zip(weights, curvatures, strict=True))
    joint = (prior * base + sum(w * h * o for w, h, o in zip(weights, curvatures, optima, strict=True))) / total
    torch.testing.assert_close(methods.uncertainty(base, models, curvatures, prior, weights), joint)


def test_gaussian_merges_again(models):
    """The product of three posteriors is that of two and one: the output must carry its own posterior."""
    directory, names, _ = models
    merge(names, directory / "all", method="gaussian")
    merge(names[:2], directory / "two", method="gaussian")
    merge([str(directory / "two"), names[2]], directory / "again", method="gaussian")
    one, other = tensors(directory / "all"), tensors(directory / "again")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)
    model = BertForSequenceClassification.from_pretrained(directory / "again")
    found, expected = load_posterior(directory / "again", model), load_posterior(directory / "all")
    for key in found.names():
        torch.testing.assert_close(found.variance[key], expected.variance[key], rtol=1e-5, atol=0)
    assert found.config.num_examples == sum(SIZES)
    assert found.config.ess == 2 * sum(SIZES)
    assert found.config.estimator == "merge-gaussian"


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "fisher", "ties"])
def test_the_other_rules_reach_the_files(models, method):
    """A method that is accepted and ignored would merge by another one."""
    directory, names, hessians = models
    merge(names, directory / "out", base_model=directory / "base", method=method, weights=[0.2, 0.3, 0.5], density=0.5)
    found, base = tensors(directory / "out"), tensors(directory / "base")
    for key, start in base.items():
        parts = [tensors(directory / n)[key] for n in "abc"]
        weights = [0.2, 0.3, 0.5]
        if method == "fisher":
            scaled = [n * h[key] for n, h in zip(SIZES, hessians, strict=True)]
            expected = methods.fisher(parts, scaled, weights)
        elif method == "ties":
            expected = start + peft_ties([p - start for p in parts], torch.tensor(weights), 0.5)
        else:
            expected = sum(w * p for w, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5)


def test_dare_drops_and_rescales(models):
    """Each difference is dropped or divided by the density, in every tensor and model by noise of its own."""
    directory, names, _ = models
    merge(names[:1] * 2, directory / "out", base_model=directory / "base", method="dare", density=0.5)
    found, base, one = tensors(directory / "out"), tensors(directory / "base"), tensors(directory / "a")
    counts = []
    for key, start in base.items():
        counts.append(((found[key] - start) / (one[key] - start) / 2).round(decimals=2).flatten())
        assert set(counts[-1].tolist()) <= {0.0, 1.0, 2.0}
    kept = torch.cat(counts)
    # each weight is kept in 0, 1 or 2 of the two models: mean 1, variance 1/2; 5 deviations
    assert abs(kept.mean() - 1) < 5 * (0.5 / len(kept)) ** 0.5
    alike = [c for c in counts if len(c) == 16 * 16]
    assert not torch.equal(alike[0], alike[1]), "tensors of one shape are dropped alike"
    merge(names[:1] * 2, directory / "again", base_model=directory / "base", method="dare", density=0.5)
    assert all(torch.equal(found[k], v) for k, v in tensors(directory / "again").items())


@pytest.mark.parametrize("k", [0, 1, 17, 500, 1000])
def test_the_threshold_of_ties_is_exact(k):
    """The magnitude from which a share of a tensor is kept, found in blocks that never meet in memory."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(k)) * 1e-3
    found = methods.kth_largest_magnitude(lambda: values.split(64), k)
    assert found == (values.abs().sort(descending=True).values[k - 1].item() if k else float("inf"))


def test_heads_are_settled_by_the_user(models):
    """Classifiers of different tasks share an encoder; guessing what to do with their heads would be wrong."""
    directory, names, _ = models
    other = tiny.bert(num_labels=5)
    save(other, directory / "five", 10, torch.Generator().manual_seed(1))
    mixed, base = [names[0], str(directory / "five")], directory / "base"
    with pytest.raises(ValueError, match=r"such as `classifier.bias`, `classifier.weight`: pass --heads drop"):
        merge(mixed, directory / "out", base_model=base)
    assert not (directory / "out").exists()
    merge(mixed, directory / "dropped", base_model=base, heads="drop")
    assert not any("classifier" in key for key in tensors(directory / "dropped"))
    merge(mixed, directory / "kept", base_model=base, heads="keep:five")
    model = BertForSequenceClassification.from_pretrained(directory / "kept")
    assert torch.equal(model.classifier.weight, other.classifier.weight)
    with pytest.raises(ValueError, match="`heads` names 'six', which is none of"):
        merge(mixed, directory / "out", base_model=base, heads="keep:six")


def test_a_base_without_a_head_and_without_a_prefix(models):
    """The pretrained encoder is saved alone, as `embeddings...` and not as `bert.embeddings...`."""
    directory, names, _ = models
    encoder = BertForSequenceClassification.from_pretrained(directory / "base").bert
    BertModel.save_pretrained(encoder, directory / "encoder")
    merge(names, directory / "whole", base_model=directory / "base")
    merge(names, directory / "alone", base_model=directory / "encoder", heads="keep:a")
    one, other = tensors(directory / "whole"), tensors(directory / "alone")
    assert all(torch.equal(one[k], other[k]) for k in one if not k.startswith("classifier"))
    assert torch.equal(other["classifier.weight"], tensors(directory / "a")["classifier.weight"])


def adapter(seed, generator):
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny.bert(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def test_adapters_merge_in_their_own_space(tmp_path):
    """Adapters of one base, rank and target: the merge must load with PEFT, with its posterior."""
    generator = torch.Generator().manual_seed(2)
    names = []
    for i, name in enumerate("ab"):
        model = adapter(i, generator)
        save(model, tmp_path / name, 100, generator)
        names.append(str(tmp_path / name))
    merge(names, tmp_path / "out", method="gaussian")
    model = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "out")
    assert load_posterior(tmp_path / "out", model).config.num_examples == 200
    a, b, out = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b", "out"))
    for key in out:
        low, high = torch.minimum(a[key], b[key]), torch.maximum(a[key], b[key])
        assert ((out[key] >= low - 1e-6) & (out[key] <= high + 1e-6)).all()


def test_all_problems_are_named_and_nothing_is_written(models):
    """People merge what others uploaded: one run must say everything that is wrong."""
    directory, names, _ = models
    for file in (directory / "a").glob("posterior*"):
        file.unlink()
    shutil.copy(directory / "b" / "model.safetensors", directory / "c" / "pytorch_model.bin")
    (directory / "c" / "model.safetensors").unlink()
    (directory / "used").mkdir()
    (directory / "used" / "file").touch()
    with pytest.raises(ValueError, match="cannot be merged") as caught:
        merge([*names, str(directory / "none")], directory / "used", base_model=None, weights=[1, -1, 1])
    message = str(caught.value)
    for expected in (
        "a has no posterior, which uncertainty needs",
        "pytorch_model.bin is a pickle, which is never read",
        "none is neither a directory nor",
        "`weights` must be one per model, got 3 for 4",
        "`weights` must be numbers of at least 0",
        "`base_model` must be given",
        "`output_dir` must be empty or new",
    ):
        assert expected in message
    assert [f.name for f in (directory / "used").iterdir()] == ["file"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wrong", ["nan", "posterior", "pair"])
def test_wrong_numbers_leave_nothing_behind(models, wrong, late, monkeypatch):
    """NaN in one model, or variances of other weights, would spoil the whole merge silently.

    The message is the same whether pairs are found wrong before or after the merge meets NaN.
    """
    directory, names, _ = models
    look = engine._pair_problems
    if late:
        monkeypatch.setattr(engine, "_pair_problems", lambda plan: [time.sleep(0.3), look(plan)][1])
    if wrong == "posterior":
        file = directory / "b" / "posterior.safetensors"
        values = load_file(file)
        values["classifier.bias"][0] = -1.0
        config = json.loads((directory / "b" / "posterior_config.json").read_text())
        save_file(values, file, metadata={"format": "pt", "mean_digest": config["mean_digest"]})
        message = "posterior of .*b cannot be used: `classifier.bias` holds variances that are not positive"
    else:
        values = tensors(directory / "b")
        values["classifier.bias"][0] = float("nan") if wrong == "nan" else 7.0
        save_file(values, directory / "b" / "model.safetensors", metadata={"format": "pt"})
        message = "posterior of .*b does not belong to the weights beside it"
    if wrong == "nan":
        shutil.rmtree(directory / "out", ignore_errors=True)
        for method in ("average", "task-arithmetic", "ties", "dare"):
            with pytest.raises(ValueError, match="`classifier.bias` of .*b holds NaN or inf"):
                merge(names, directory / "out", base_model=directory / "base", method=method)
    with pytest.raises(ValueError, match=message):
        merge(names, directory / "out", base_model=directory / "base")
    assert not (directory / "out").exists()
    assert not list(directory.glob(".out*"))


def test_an_interrupted_merge_leaves_nothing(models, monkeypatch):
    """Half a model must not look like a model; the same command must work again."""
    directory, names, _ = models

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_carry_over", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(names, directory / "out", method="average")
    assert not (directory / "out").exists()
    assert not list(directory.glob(".out*"))
    merge(names, directory / "out", method="average")
    assert (directory / "out" / "config.json").exists()


def test_tokenizers_must_agree(models):
    """Averaging the embeddings of different tokens makes neither."""
    directory, names, _ = models
    for name, words in (("a", {"good": 0, "bad": 1}), ("b", {"good": 0, "film": 1})):
        (directory / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    with pytest.raises(
        ValueError, match=r"tokenizers of .*a and .*b differ, first in 'bad' \(1 in .*a, None in .*b\)"
    ):
        merge(names, directory / "out", method="average")


def test_dtype_report_and_dry_run(models):
    """The report says what was made of what; a dry run writes nothing."""
    directory, names, _ = models
    plan = merge(names, directory / "out", method="fisher", dry_run=True)
    assert plan["num_merged"] == plan["num_tensors"] > 10
    assert not (directory / "out").exists()
    report = merge(names, directory / "out", method="fisher", dtype=torch.bfloat16)
    assert json.loads((directory / "out" / "merge_report.json").read_text()) == report
    assert {t.dtype for t in tensors(directory / "out").values()} == {torch.bfloat16}
    shares = report["tensors"]["classifier.weight"]["shares"]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[1] > shares[0] > shares[2]  # 300, 100 and 50 examples
    assert report["notes"] == []


def test_the_report_measures_distance_and_dispersion(models):
    """How far a rule is from averaging, and a Hessian from its start, decide whether posteriors were worth having."""
    directory, names, hessians = models
    report = merge(names, directory / "out", method="fisher")
    name = "bert.embeddings.word_embeddings.weight"
    made, parts = tensors(directory / "out")[name], [tensors(directory / n)[name] for n in "abc"]
    average = sum(parts) / 3
    spread = sum((part - average).square().sum() for part in parts)
    found = report["tensors"][name]
    expected = ((made - average).square().sum() / spread).sqrt().item()
    assert found["distance_from_average"] == pytest.approx(expected, rel=1e-4)
    for i, hess in enumerate(hessians):
        logs = hess[name].reshape(-1)[::64].log()  # of which the report looks at one in 64
        assert found["trust_from_start"][i] == pytest.approx(
            (logs - math.log(0.5)).square().mean().sqrt().item(), rel=1e-3
        )
        assert found["trust_spread"][i] == pytest.approx(logs.std(correction=0).item(), rel=1e-3)
    plain = merge(names, directory / "plain", method="average")
    assert {t["distance_from_average"] for t in plain["tensors"].values()} == {0.0}


def test_a_merge_shows_how_far_it_is(models, capfd):
    """Large merges take minutes: who sees nothing takes them for stuck. The bar must get to the end."""
    directory, names, _ = models
    merge(names, directory / "out", method="average")
    shown = capfd.readouterr().err
    assert "Merging" in shown
    assert "100%" in shown


def test_flat_posteriors_are_called_flat(models):
    """A user who merges posteriors that have learnt nothing must hear that they got the average."""
    directory, _, _ = models
    names = []
    for name in "ab":
        model = BertForSequenceClassification.from_pretrained(directory / name)
        posterior, _ = posterior_of(model, 100, torch.Generator().manual_seed(0))
        flat = Posterior({k: torch.full_like(v, 1e-3) for k, v in posterior.variance.items()}, posterior.config)
        save_posterior(flat, directory / name)
        names.append(str(directory / name))
    assert "plain averaging" in merge(names, directory / "out", method="gaussian")["notes"][0]


def test_the_function_has_the_packages_name(models):
    """`hf_ivon.merge(...)` is what the documentation says, beside the modules below that name."""
    import hf_ivon

    directory, names, _ = models
    hf_ivon.merge(names, directory / "out", method="average")
    assert (directory / "out" / "model.safetensors").exists()
    assert hf_ivon.merge.methods.average is methods.average


def test_the_command(models):
    """One command with lists as people write them; a mistake is one line and exit code 2."""
    directory, names, _ = models
    assert spread(["merge", "--models", "a", "b", "--seed", "1", "--weights", "1", "2"]) == ([
        "merge",
        "--models",
        "a",
        "--models",
        "b",
        "--seed",
        "1",
        "--weights",
        "1",
        "--weights",
        "2",
    ])
    flags = [
        "--base-model",
        str(directory / "base"),
        "--output-dir",
        str(directory / "out"),
        "--weights",
        "1",
        "1",
        "1",
    ]
    result = CliRunner().invoke(app, spread(["merge", "--models", *names, *flags]))
    assert result.exit_code == 0, result.output
    assert "merged into" in result.output
    assert "Farthest tensor from plain averaging" in result.output
    result = CliRunner().invoke(app, spread(["merge", "--models", *names, *flags]))
    assert result.exit_code == 2
    assert "`output_dir` must be empty or new" in result.output
