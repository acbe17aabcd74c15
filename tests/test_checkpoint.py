"""The posterior's files: what is written is read, what is damaged is refused, what fails loses nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ivon import checkpoint
from hf_ivon.checkpoint import PosteriorFormatError, load_posterior, posterior_files, save_posterior
from hf_ivon.optim import IVON
from hf_ivon.posterior import Posterior
from tests import tiny

V1 = Path(__file__).parent / "data" / "posterior_v1"


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


@pytest.mark.parametrize("when", ["tensors", "rename"])
def test_a_failed_save_leaves_the_earlier_posterior(tmp_path, monkeypatch, when):
    """A full disk or a kill during saving must not cost the posterior that was there."""
    _, posterior = make()
    save_posterior(posterior, tmp_path)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    if when == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_posterior(make(seed=1)[1], tmp_path)
    monkeypatch.undo()
    assert_same(load_posterior(tmp_path), posterior)
    assert len(list(tmp_path.iterdir())) == 2, "temporary files were left behind"


def test_bad_variances_are_not_written(tmp_path):
    """A diverged run must not replace a good posterior by NaN."""
    _, posterior = make()
    save_posterior(posterior, tmp_path)
    bad = Posterior({**posterior.variance, "0.bias": torch.full((8,), torch.nan)}, posterior.config)
    with pytest.raises(ValueError, match="`0.bias` holds NaN"):
        save_posterior(bad, tmp_path)
    assert_same(load_posterior(tmp_path), posterior)


def damage_missing(d):
    (d / "posterior.safetensors").unlink()


def damage_pickle(d):
    (d / "posterior.safetensors").rename(d / "posterior.bin")


def damage_truncate(d):
    data = (d / "posterior.safetensors").read_bytes()
    (d / "posterior.safetensors").write_bytes(data[: len(data) // 2])


def damage_json(d):
    (d / "posterior_config.json").write_text("{")


def damage_foreign(d):
    (d / "posterior_config.json").write_text("[1]")


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
    damage_json: "posterior_config.json is not readable JSON",
    damage_foreign: "does not hold a JSON object",
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


def test_mixed_shards_are_refused(tmp_path):
    """After a crash between two renames the directory holds shards of two saves."""
    _, posterior = make()
    save_posterior(posterior, tmp_path / "a", max_shard_size=100)
    save_posterior(make(seed=1)[1], tmp_path / "b", max_shard_size=100)
    shard = next((tmp_path / "a").glob("posterior-00001*"))
    shutil.copy(tmp_path / "b" / shard.name, shard)
    with pytest.raises(PosteriorFormatError, match="from different saves"):
        load_posterior(tmp_path / "a")


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    """A downloaded index must not make us read files outside of its directory."""
    _, posterior = make()
    save_posterior(posterior, tmp_path, max_shard_size=100)
    index = json.loads((tmp_path / "posterior.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret.safetensors")
    (tmp_path / "posterior.safetensors.index.json").write_text(json.dumps(index))
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


def test_version_1_files_load_for_ever():
    """Checkpoints on the Hub outlive the code that wrote them."""
    posterior = load_posterior(V1)
    assert posterior.names() == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert posterior.config.format_version == 1
    assert (posterior.config.ess, posterior.config.num_examples, posterior.config.steps) == (100.0, 5, 1)
