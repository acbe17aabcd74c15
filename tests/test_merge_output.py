"""Where a merge appears, what comes along with it, and what its files say of themselves."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from hf_ivon import load_posterior
from hf_ivon.merge import files, merge, methods, report
from tests.test_merge import models, tensors

__all__ = ["models"]


@pytest.mark.parametrize("kind", ["link", "dangling", "here", "stuck"])
def test_any_empty_directory_is_a_place(models, monkeypatch, kind):
    """A link to a large disk, the directory where the user stands, or a mount point, which cannot be removed: the
    merge ran to its end, and was then deleted."""
    directory, names, _ = models
    real, target = directory / "disk" / "out", directory / "link"
    if kind in ("link", "here", "stuck"):
        real.mkdir(parents=True)
    if kind in ("link", "dangling"):
        os.symlink(real, target)
    elif kind == "here":
        monkeypatch.chdir(real)
        target = Path()
    else:
        target = real
        monkeypatch.setattr(Path, "rmdir", lambda self: (_ for _ in ()).throw(OSError("busy")))
    merge(names, target, method="average")
    BertForSequenceClassification.from_pretrained(real)
    assert target.resolve() == real
    assert not list(directory.glob("**/.*-*"))


def test_a_merge_that_cannot_be_moved_is_kept(models, monkeypatch):
    """It may have taken an hour."""
    directory, names, _ = models

    def fail(source, target, replace=os.replace):
        if Path(target) == directory / "out":
            raise OSError("Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="The merge is whole in .*, but cannot be moved to .*busy") as caught:
        merge(names, directory / "out", method="average")
    monkeypatch.undo()
    kept = str(caught.value).split("whole in ")[1].split(",")[0]
    BertForSequenceClassification.from_pretrained(kept)


@pytest.mark.parametrize("fails", [False, True])
def test_a_place_in_one_where_one_cannot_write(models, monkeypatch, fails):
    """A directory that the administrator made for the user, below one of the administrator: it was refused."""
    directory, names, _ = models
    target = directory / "mine"
    target.mkdir()

    def refuse(prefix, dir, mkdtemp=tempfile.mkdtemp):
        if dir == directory:
            raise PermissionError("Permission denied")
        return mkdtemp(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr(Path, "rmdir", lambda self: (_ for _ in ()).throw(PermissionError("Permission denied")))
    if fails:
        values = tensors(directory / "b")
        values["classifier.bias"][0] = float("nan")
        save_file(values, directory / "b" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="holds NaN or inf"):
            merge(names, target, method="average")
        assert not list(target.iterdir())
    else:
        merge(names, target, method="average")
        BertForSequenceClassification.from_pretrained(target)
        assert not list(target.glob(".*"))
    with pytest.raises(PermissionError, match="Permission denied"):
        merge(names[:1], directory / "new", method="average")


def test_a_place_where_one_cannot_write_is_named_first(models):
    """Not after the merge, and not by a traceback."""
    directory, names, _ = models
    (directory / "file").write_text("")
    with pytest.raises(ValueError, match="`output_dir` must be where one can write, got .*out', in .*file'"):
        merge(names, directory / "file" / "more" / "out", method="average")


@pytest.mark.parametrize("method", ["average", "gaussian"])
def test_the_configuration_says_the_chosen_dtype(models, method):
    """Transformers loads a model in the dtype of its configuration: the posterior of bf16 weights in fp32 is refused,
    as that of another mean."""
    directory, names, _ = models
    merge(names, directory / "out", method=method, dtype=torch.bfloat16)
    model = BertForSequenceClassification.from_pretrained(directory / "out")
    assert model.dtype == torch.bfloat16
    assert json.loads((directory / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    if method == "gaussian":
        load_posterior(directory / "out", model)


def test_what_does_not_fit_a_dtype_is_an_error(models):
    """fp16 ends at 65,504: a model with inf in it loads, and gives NaN."""
    directory, names, _ = models
    file = directory / "a" / "model.safetensors"
    state = load_file(file)
    state["classifier.bias"][1] = 3e5
    save_file(state, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"merge of `classifier.bias` is too large for float16. Pass --dtype bfloat16"
    ):
        merge(names, directory / "out", method="average", dtype=torch.float16)
    assert not (directory / "out").exists()
    state["classifier.bias"][:2] = torch.finfo(torch.float32).max  # each is a number, their sum is none
    save_file(state, file, {"format": "pt"})
    merge(names, directory / "large", method="average", weights=[1.0, 0.0, 0.0])
    assert torch.equal(tensors(directory / "large")["classifier.bias"], state["classifier.bias"])


def test_what_shows_another_model_stays_behind(models):
    """Its figures, results and other formats of its weights would be taken for the merge's."""
    directory, names, _ = models
    stale = ["tf_model.h5", "model.onnx", "flax_model.msgpack", "reliability.png", "sensitivity.jsonl", "sweep.json"]
    for name in [*stale, "modeling_own.py", "NOTICE"]:
        (directory / "a" / name).write_text("{}")
    merge(names, directory / "out", method="average")
    found = {p.name for p in (directory / "out").iterdir()}
    assert not found & set(stale)
    assert {"modeling_own.py", "NOTICE"} <= found


def test_a_repository_comes_without_checkpoints_and_with_its_code(monkeypatch, tmp_path):
    """`trust_remote_code` models need their code; a training run's checkpoints are many times the model."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kwargs: asked.update(kwargs) or tmp_path)
    files.Checkpoint.open("me/model", [])
    everything = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "posterior.safetensors",
        "1_Pooling/config.json",
    ]
    everything += ["modeling_own.py", "vocab.bpe", "NOTICE", "qwen.tiktoken"]
    other = [
        "checkpoint-5/model.safetensors",
        "checkpoint-5/config.json",
        "consolidated.safetensors",
        "pytorch_model.bin",
    ]
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert set(huggingface_hub.utils.filter_repo_objects([*everything, *other], **patterns)) == set(everything)


def test_the_card_names_repositories_only(models, monkeypatch):
    """The Hub shows `base_model` as links; a directory of the user's machine is none."""
    directory, names, _ = models
    monkeypatch.chdir(directory)
    shutil.copytree("a", "me/local")
    found = merge(["./a", "me/local"], directory / "out", method="average")
    assert "base_model:" not in (directory / "out" / "README.md").read_text()
    text = report.card({**found, "models": ["me/one@v2", "./a", "gpt2"], "weights": [1.0] * 3, "tensors": {}})
    assert "base_model:\n- me/one\n- gpt2\n---" in text


def test_the_posteriors_are_called_flat_only_if_they_are(models):
    """With one weight above 0, or one model given twice, the result is an average too."""
    directory, names, _ = models
    assert merge(names[:2], directory / "one", method="gaussian", weights=[1.0, 0.0])["notes"] == []
    shutil.copytree(names[0], directory / "copy")
    assert merge([names[0], str(directory / "copy")], directory / "twice", method="fisher")["notes"] == []


def test_a_counter_of_batches_does_not_stop_a_merge(models):
    """BatchNorm's differs between any two runs; other whole numbers that differ are another matter."""
    directory, names, _ = models
    for name, steps in zip(names, (5, 9, 7), strict=True):
        file = f"{name}/model.safetensors"
        extra = {"bert.norm.num_batches_tracked": torch.tensor(steps), "bert.positions": torch.arange(3) + steps}
        save_file({**load_file(file), **extra}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="`bert.positions` holds no real numbers and differs between the models"):
        merge(names, directory / "out", method="average")
    for name in names:
        file = f"{name}/model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if k != "bert.positions"}, file, {"format": "pt"})
    merge(names, directory / "out", method="average")
    assert tensors(directory / "out")["bert.norm.num_batches_tracked"] == 9


def test_a_model_with_weight_0_has_no_vote():
    """At the ends of a sweep, TIES elected signs by a model that was not to count, and halved the other."""
    generator = torch.Generator().manual_seed(0)
    base, one, other = (torch.randn(40, generator=generator) for _ in range(3))
    alone = methods.ties(base, [one], [1.0], [0.5])
    torch.testing.assert_close(methods.ties(base, [one, other], [1.0, 0.0], [0.5, 0.1]), alone, rtol=0, atol=0)
