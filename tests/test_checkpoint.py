"""The posterior's files: what is written is read, what is damaged is refused, what fails loses nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from hf_ivon import checkpoint
from hf_ivon.checkpoint import PosteriorFormatError, load_posterior, posterior_files, save_posterior, variance_problems
from hf_ivon.optim import IVON
from hf_ivon.posterior import Posterior
from tests import tiny

V1 = Path(__file__).parent / "data" / "posterior_v1"
V1_BIAS_VARIANCE = [0.00472174212, 7.38229355e-05]


def make(seed=0):
    """Return a small model and its posterior, with variances that differ."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = IVON(model.parameters(), lr=0.1, ess=100.0, beta2=0.9)
    with optimizer.sampled_params(train=True):
        model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model, Posterior.from_optimizer(optimizer, model, num_examples=5)


def make_v1(directory):
    """Write the checkpoint in tests/data/posterior_v1; it was made once and must load for ever."""
    model, posterior = make()
    save_posterior(posterior, directory)
    save_file({name: p.detach() for name, p in model.named_parameters()}, Path(directory) / "model.safetensors")


def assert_same(first, second):
    assert first.config == second.config
    assert first.names() == second.names()
    assert all(torch.equal(first.variance[n], second.variance[n]) for n in first.names())


@pytest.mark.parametrize("max_shard_size", ["5GB", 100])
def test_round_trip(tmp_path, max_shard_size):
    """What was trained must come back to the last bit, in one file or in shards."""
    model, posterior = make()
    files = save_posterior(posterior, tmp_path, max_shard_size=max_shard_size)
    assert files == posterior_files(tmp_path) == sorted(tmp_path.iterdir())
    assert (tmp_path / "posterior.safetensors.index.json").exists() == (max_shard_size == 100)
    assert_same(load_posterior(tmp_path, model), posterior)
    assert_same(load_posterior(tmp_path), posterior)


def test_files_of_an_earlier_save_go_away(tmp_path):
    """A stale shard or index beside a new file would be read instead of it."""
    _, posterior = make()
    save_posterior(posterior, tmp_path, max_shard_size=100)
    save_posterior(posterior, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"posterior.safetensors", "posterior_config.json"}
    save_posterior(posterior, tmp_path, max_shard_size=100)
    assert not (tmp_path / "posterior.safetensors").exists()
    assert_same(load_posterior(tmp_path), posterior)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["tensors", "rename"])
def test_a_failed_save_leaves_the_earlier_posterior(tmp_path, monkeypatch, when, error):
    """A full disk or a kill during saving must not cost the posterior that was there."""
    _, posterior = make()
    save_posterior(posterior, tmp_path)

    def fail(path, *args, **kwargs):
        if when == "tensors":
            Path(args[0]).write_bytes(b"half a file")
        raise error("No space left on device")

    if when == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(error, match="No space"):
        save_posterior(make(seed=1)[1], tmp_path)
    monkeypatch.undo()
    assert_same(load_posterior(tmp_path), posterior)
    assert len(list(tmp_path.iterdir())) == 2, "temporary files were left behind"


def test_a_save_cut_between_two_renames_is_recognized(tmp_path, monkeypatch):
    """New variances under an old configuration would be read with the wrong ess, around the wrong mean."""
    save_posterior(make()[1], tmp_path)
    replace, calls = os.replace, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", fail_second)
    with pytest.raises(KeyboardInterrupt):
        save_posterior(make(seed=1)[1], tmp_path)
    monkeypatch.undo()
    with pytest.raises(PosteriorFormatError, match="from different saves"):
        load_posterior(tmp_path)
    save_posterior(make(seed=1)[1], tmp_path)
    assert_same(load_posterior(tmp_path), make(seed=1)[1])


def test_bad_variances_are_not_written(tmp_path):
    """A diverged run must not replace a good posterior by NaN, nor an empty one by nothing."""
    _, posterior = make()
    save_posterior(posterior, tmp_path)
    bad = Posterior({**posterior.variance, "0.bias": torch.full((8,), torch.nan)}, posterior.config)
    with pytest.raises(ValueError, match="`0.bias` holds NaN"):
        save_posterior(bad, tmp_path)
    with pytest.raises(ValueError, match="holds no tensor"):
        save_posterior(Posterior({}, posterior.config), tmp_path)
    assert_same(load_posterior(tmp_path), posterior)


def test_other_precisions_and_layouts_are_written_as_fp32(tmp_path):
    """Variances computed by others come in fp64, or transposed; the file has one form."""
    _, posterior = make()
    variance = {n: v.double().t().contiguous().t() if v.dim() == 2 else v for n, v in posterior.variance.items()}
    save_posterior(Posterior(variance, posterior.config), tmp_path)
    assert_same(load_posterior(tmp_path), posterior)


def test_variances_may_be_views_of_one_tensor(tmp_path):
    """Flat variances cut into parameters, or one tensor under two names, ended in an error of the files' library."""
    _, posterior = make()
    sizes = [v.numel() for v in posterior.variance.values()]
    flat = torch.cat([v.reshape(-1) for v in posterior.variance.values()])
    views = {n: part.view(v.shape) for (n, v), part in zip(posterior.variance.items(), flat.split(sizes), strict=True)}
    save_posterior(Posterior(views, posterior.config), tmp_path)
    assert_same(load_posterior(tmp_path), posterior)
    same = Posterior({**views, "2.weight": views["0.weight"][:2]}, posterior.config)
    save_posterior(same, tmp_path, max_shard_size=100)
    assert_same(load_posterior(tmp_path), same)
    part = Posterior({"0.bias": views["0.bias"]}, posterior.config)
    assert sum(f.stat().st_size for f in save_posterior(part, tmp_path)) < 2000
    assert_same(load_posterior(tmp_path), part)


def damage_missing(d):
    (d / "posterior.safetensors").unlink()


def damage_pickle(d):
    (d / "posterior.safetensors").rename(d / "posterior.bin")


def damage_truncate(d):
    data = (d / "posterior.safetensors").read_bytes()
    (d / "posterior.safetensors").write_bytes(data[: len(data) // 2])


def damage_content(d):
    (d / "posterior.safetensors").write_bytes(pickle.dumps({"0.bias": [1.0]}))


def damage_json(d):
    (d / "posterior_config.json").write_text("{")


def damage_foreign(d):
    (d / "posterior_config.json").write_text("[1]")


def damage_other_format(d):
    (d / "posterior_config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))


def damage_version(d):
    edit(d, format_version=99)


def damage_ess(d):
    edit(d, ess=-1.0)


def damage_names(d):
    edit(d, ess={"another tensor": 1.0})


def damage_nan(d):
    rewrite(d, lambda t: t.index_fill(0, torch.tensor([0]), torch.nan))


def damage_negative(d):
    rewrite(d, torch.neg)


def damage_dtype(d):
    rewrite(d, torch.Tensor.bfloat16)


def damage_digest(d):
    edit(d, mean_digest="0" * 64)


def edit(d, **changes):
    config = json.loads((d / "posterior_config.json").read_text())
    (d / "posterior_config.json").write_text(json.dumps({**config, **changes}))


def rewrite(d, change):
    digest = json.loads((d / "posterior_config.json").read_text())["mean_digest"]
    tensors = load_file(d / "posterior.safetensors")
    tensors["2.bias"] = change(tensors["2.bias"])
    save_file(tensors, d / "posterior.safetensors", metadata={"mean_digest": digest})


DAMAGE = {
    damage_missing: "posterior.safetensors is missing",
    damage_pickle: "posterior.bin is a pickle, which is never read",
    damage_truncate: "truncated or not a safetensors file",
    damage_content: "truncated or not a safetensors file",
    damage_json: "posterior_config.json is not readable JSON",
    damage_foreign: "does not hold a JSON object",
    damage_other_format: "`ess` is missing.*`mean_digest` is missing.*`model_type` is not a key of this format",
    damage_version: "`format_version` is 99",
    damage_ess: "`ess` must be a positive number",
    damage_names: "`ess` in posterior_config.json is not given for every tensor",
    damage_nan: "`2.bias` holds NaN or inf",
    damage_negative: "`2.bias` holds variances that are not positive",
    damage_dtype: "`2.bias` is bfloat16, not float32",
    damage_digest: "are from different saves",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_damaged_files_are_refused(tmp_path, damage):
    """Each kind of damage must be named; a posterior that loads is right."""
    model, posterior = make()
    save_posterior(posterior, tmp_path)
    damage(tmp_path)
    with pytest.raises(PosteriorFormatError, match=DAMAGE[damage]):
        load_posterior(tmp_path, model)


def test_all_problems_come_in_one_message(tmp_path):
    """One problem at a time is one download at a time."""
    _, posterior = make()
    save_posterior(posterior, tmp_path)
    rewrite(tmp_path, torch.neg)
    edit(tmp_path, ess=-1.0, steps="many")
    with pytest.raises(PosteriorFormatError) as error:
        load_posterior(tmp_path)
    for part in ("`ess`", "`steps`", "`2.bias`", str(tmp_path), "Save it again"):
        assert part in str(error.value)
    with pytest.raises(PosteriorFormatError) as error:
        load_posterior(tmp_path, nn.Sequential(nn.Linear(4, 6)))
    wrong_model = ("the model lacks `2.bias`, `2.weight`", "`0.bias` has shape (8,) in the posterior and (6,)")
    for part in ("`ess`", "`steps`", "`2.bias` holds variances that are not positive", *wrong_model):
        assert part in str(error.value)
    with pytest.raises(PosteriorFormatError, match="config.json is missing; posterior.safetensors is missing"):
        load_posterior(tmp_path / "nowhere")


def test_mixed_shards_are_refused(tmp_path):
    """After a crash between two renames the directory holds shards of two saves."""
    _, posterior = make()
    save_posterior(posterior, tmp_path / "a", max_shard_size=100)
    save_posterior(make(seed=1)[1], tmp_path / "b", max_shard_size=100)
    shard = next((tmp_path / "a").glob("posterior-00001*"))
    shutil.copy(tmp_path / "b" / shard.name, shard)
    with pytest.raises(PosteriorFormatError, match="from different saves"):
        load_posterior(tmp_path / "a")


def test_incomplete_shards_are_refused(tmp_path):
    """Half a download must not load as a posterior over half of the weights."""
    _, posterior = make()
    save_posterior(posterior, tmp_path, max_shard_size=100)
    first, *_ = sorted(tmp_path.glob("posterior-*"))
    save_file(dict.fromkeys(["x"], torch.ones(1)), first, metadata={"mean_digest": posterior.config.mean_digest})
    with pytest.raises(PosteriorFormatError, match=f"{first.name} and the index disagree about 0.weight, x"):
        load_posterior(tmp_path)
    first.unlink()
    with pytest.raises(PosteriorFormatError, match=f"{first.name} is missing"):
        load_posterior(tmp_path)


@pytest.mark.parametrize("weight_map", [{"0.bias": "../secret.safetensors"}, {"0.bias": 3}, {}, None, ["0.bias"]])
def test_a_bad_index_is_refused(tmp_path, weight_map):
    """A downloaded index must not lead outside of its directory, nor to a posterior without tensors."""
    _, posterior = make()
    save_posterior(posterior, tmp_path, max_shard_size=100)
    (tmp_path / "posterior.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(PosteriorFormatError, match="no valid `weight_map`"):
        load_posterior(tmp_path)


def test_the_mean_must_be_the_right_one(tmp_path):
    """Variances around weights they do not belong to are wrong in a way that nothing else would show."""
    model, posterior = make()
    save_posterior(posterior, tmp_path)
    other, _ = make(seed=1)
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        load_posterior(tmp_path, other)
    save_file({name: p.detach() for name, p in other.named_parameters()}, tmp_path / "model.safetensors")
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        load_posterior(tmp_path)
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    assert_same(load_posterior(tmp_path), posterior)
    with pytest.raises(PosteriorFormatError, match=r"lacks `0.bias`.*"):
        load_posterior(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_a_real_checkpoint_is_checked_without_loading_the_model(tmp_path, max_shard_size):
    """Beside a saved Transformers model, tied and perhaps sharded, the pairing is checked from the files alone."""
    model = tiny.gpt2()
    posterior = Posterior.from_optimizer(IVON(model.parameters(), lr=0.1, ess=10.0), model)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    save_posterior(posterior, tmp_path, max_shard_size=max_shard_size)
    assert_same(load_posterior(tmp_path), posterior)
    assert_same(load_posterior(tmp_path, type(model).from_pretrained(tmp_path)), posterior)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] += 1
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    with pytest.raises(PosteriorFormatError, match="the mean beside it"):
        load_posterior(tmp_path)


def test_an_incomplete_mean_is_refused(tmp_path):
    """A lost shard of the model would otherwise switch the check of the pairing off; no model at all is fine."""
    model = tiny.gpt2()
    posterior = Posterior.from_optimizer(IVON(model.parameters(), lr=0.1, ess=10.0), model)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    save_posterior(posterior, tmp_path)
    first, *others = sorted(tmp_path.glob("model-*"))
    first.unlink()
    with pytest.raises(PosteriorFormatError, match=f"the mean beside it cannot be read: {first.name} is missing"):
        load_posterior(tmp_path)
    for shard in others:
        shard.unlink()
    assert_same(load_posterior(tmp_path), posterior)


def test_a_damaged_mean_is_refused(tmp_path):
    """A posterior whose mean cannot be read is of no use, and the message must say which file it is."""
    _, posterior = make()
    save_posterior(posterior, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(PosteriorFormatError, match="the mean beside it cannot be read"):
        load_posterior(tmp_path)


def test_a_mean_with_other_names_is_reported(tmp_path, caplog):
    """Some models are saved with fused tensors, so it may be right; unchecked without a word it must not be."""
    model, posterior = make()
    save_posterior(posterior, tmp_path)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors["renamed"] = tensors.pop("2.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_posterior(tmp_path), posterior)
    assert "whose file lacks 1 of its names" in caplog.text
    save_file({**tensors, "0.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(PosteriorFormatError, match=r"`0.bias` has shape \(8,\) in the posterior and \(3,\)"):
        load_posterior(tmp_path)


def test_another_file_does_not_hide_the_mean(tmp_path):
    """With an adapter and a model in one directory, the posterior is checked against the one it is of."""
    model, posterior = make()
    save_posterior(posterior, tmp_path)
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    assert_same(load_posterior(tmp_path), posterior)
    save_file({name: p.detach() + 1 for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        load_posterior(tmp_path)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True}])
def test_an_adapters_checkpoint_round_trips(tmp_path, options):
    """The posterior of a LoRA run must pair with the adapter's file, and with the model loaded from it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    model = peft.get_peft_model(tiny.gpt2(), config)
    params = [p for p in model.parameters() if p.requires_grad]
    posterior = Posterior.from_optimizer(IVON(params, lr=0.1, ess=10.0), model)
    model.save_pretrained(tmp_path)
    posterior.save_pretrained(tmp_path)
    assert_same(Posterior.from_pretrained(tmp_path), posterior)
    assert_same(load_posterior(tmp_path, peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path)), posterior)
    with torch.no_grad():
        params[0][0] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        load_posterior(tmp_path)


@pytest.mark.parametrize(("trained", "loaded"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_mean_may_be_loaded_in_another_dtype(tmp_path, trained, loaded):
    """A head trained on a base in bf16 is saved in bf16, and was refused on the same base in fp32."""
    peft = pytest.importorskip("peft")
    tiny.bert(num_labels=2).save_pretrained(tmp_path / "base")

    def base(dtype):
        return BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    model = peft.get_peft_model(base(trained), config)
    params = [p for p in model.parameters() if p.requires_grad]
    posterior = Posterior.from_optimizer(IVON(params, lr=0.1, ess=10.0), model)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    posterior.save_pretrained(adapter)
    found = peft.PeftModel.from_pretrained(base(loaded), adapter)
    own = {p.dtype for name, p in found.named_parameters() if "modules_to_save" in name}
    assert own == {getattr(torch, loaded)}
    assert_same(load_posterior(adapter, found), posterior)
    with torch.no_grad():
        [p for name, p in found.named_parameters() if "modules_to_save" in name][0][0] *= 1.01
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        load_posterior(adapter, found)
    found = peft.PeftModel.from_pretrained(base(loaded), adapter)
    with torch.no_grad():
        params[0][0] += 1
    model.save_pretrained(adapter)  # over the mean that the posterior belongs to
    for changed in (found, peft.PeftModel.from_pretrained(base(loaded), adapter)):
        with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
            load_posterior(adapter, changed)


def test_the_format_is_still_version_1(tmp_path):
    """A change of what is written needs a new version number, and a reader for this one."""
    make_v1(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in V1.iterdir()}
    written, kept = (json.loads((d / "posterior_config.json").read_text()) for d in (tmp_path, V1))
    assert written.keys() == kept.keys()
    for name in ("model.safetensors", "posterior.safetensors"):
        written, kept = (load_file(d / name) for d in (tmp_path, V1))
        assert {n: (t.dtype, t.shape) for n, t in written.items()} == {n: (t.dtype, t.shape) for n, t in kept.items()}


def test_version_1_files_load_for_ever():
    """Checkpoints on the Hub outlive the code that wrote them."""
    model, _ = make()
    model.load_state_dict(load_file(V1 / "model.safetensors"))
    assert load_posterior(V1, model).names() == load_posterior(V1).names()
    posterior = load_posterior(V1)
    torch.testing.assert_close(posterior.variance["2.bias"], torch.tensor(V1_BIAS_VARIANCE))
    assert posterior.names() == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert posterior.config.format_version == 1
    assert (posterior.config.ess, posterior.config.num_examples, posterior.config.steps) == (100.0, 5, 1)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1e-30, 3e38], None),
        ([], None),
        ([1.0, 0.0], "not positive"),
        ([1.0, -1.0], "not positive"),
        ([1.0, float("inf")], "NaN or inf"),
        ([float("nan"), 1.0], "NaN or inf"),
        ([-1.0, float("nan"), 1.0], "NaN or inf"),
    ],
)
def test_variances_are_checked_in_one_look(values, problem):
    """A merge checks every piece of every posterior: a cheap look must find what a thorough one would."""
    found = variance_problems("a", torch.tensor(values))
    assert found == [] if problem is None else problem in found[0]
