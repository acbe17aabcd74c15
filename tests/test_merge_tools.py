"""What stands around the merging rules: heads, shards, weights by examples, sweeps, the commands."""

import json
import math
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel

from hf_ivon import load_posterior
from hf_ivon.cli.merge import _keep_sweep
from hf_ivon.data import evaluate, load_batches, load_checkpoint
from hf_ivon.merge import engine, files, load_head, merge, report
from hf_ivon.merge.plan import make_plan
from hf_ivon.merge.sweep import grid, pareto, sweep
from hf_ivon.tensor_files import TensorFiles
from tests import tiny
from tests.classifiers import classifiers, invoke
from tests.test_merge import SIZES, models, save, tensors

__all__ = ["classifiers", "models"]


def test_separate_heads_come_back_as_each_model(models):
    """One shared encoder with a head per task must give each task's own model class, labels and head."""
    directory, names, _ = models
    other = tiny.bert(num_labels=5, seed=9)
    save(other, directory / "five", 10, torch.Generator().manual_seed(1))
    mixed = [names[0], str(directory / "five")]
    report = merge(mixed, directory / "out", base_model=directory / "base", heads="separate")
    assert report["separate"] == ["classifier.bias", "classifier.weight"]
    assert report["dropped"] == []
    five, three = load_head(directory / "out", "five"), load_head(directory / "out", "a")
    assert torch.equal(five.classifier.weight, other.classifier.weight)
    assert three.num_labels == 3
    shared = tensors(directory / "out")
    for model in (five, three):
        for name, p in model.named_parameters():
            assert name.startswith("classifier") or torch.equal(p, shared[name])
    with pytest.raises(ValueError, match=r"must be one of the merge's heads \(a, five\), got 'six'"):
        load_head(directory / "out", "six")


def test_separate_heads_have_the_dtype_of_the_merge(models):
    """A merge in bf16 would take twice the memory when it is loaded with one of its heads."""
    directory, names, _ = models
    save(tiny.bert(num_labels=5, seed=9), directory / "five", 10, torch.Generator().manual_seed(1))
    mixed, options = [names[0], str(directory / "five")], {"base_model": directory / "base", "heads": "separate"}
    merge(mixed, directory / "out", dtype=torch.bfloat16, **options)
    assert {p.dtype for p in load_head(directory / "out", "five").parameters()} == {torch.bfloat16}


def test_heads_of_one_name_are_refused(models):
    """Two directories called "best" would write over each other's head."""
    directory, names, _ = models
    save(tiny.bert(num_labels=5), directory / "more" / "a", 10, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="two models have the same last part of their name"):
        merge([names[0], str(directory / "more" / "a")], directory / "out", method="average", heads="separate")


@pytest.mark.parametrize("method", ["average", "gaussian"])
def test_shards_hold_the_same_merge(models, method):
    """Large models come in shards: mean and posterior must be those of one file, and load."""
    directory, names, _ = models
    merge(names, directory / "one", method=method)
    merge(names, directory / "many", method=method, max_shard_size=4000)
    assert len(list((directory / "many").glob("model-*-of-*.safetensors"))) > 2
    whole = BertForSequenceClassification.from_pretrained(directory / "one")
    model = BertForSequenceClassification.from_pretrained(directory / "many")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
    if method == "gaussian":
        one, many = load_posterior(directory / "one", whole), load_posterior(directory / "many", model)
        assert all(torch.equal(one.variance[n], many.variance[n]) for n in one.names())
        merge([str(directory / "many"), names[0]], directory / "again", method=method)


def test_models_of_different_bases_are_refused(models):
    """Weights of networks that never were one have nothing to do with each other, whatever their shapes are."""
    directory, names, _ = models
    for name, base in (("a", "some/where/bert"), ("b", "bert"), ("c", "roberta")):
        file = directory / name / "posterior_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model": base}))
    merge(names[:2], directory / "two", method="average")
    with pytest.raises(ValueError, match=r"from different ones \(.*c from roberta\).*name it by --base-model"):
        merge(names, directory / "out", method="average")
    merge(names, directory / "out", method="average", base_model=directory / "base")


def test_weights_by_examples(models):
    """A model of 300 examples counts three times one of 100; without the numbers it must be said."""
    directory, names, _ = models
    report = merge(names, directory / "out", method="average", weights="examples")
    assert report["weights"] == pytest.approx([3 * n / sum(SIZES) for n in SIZES])
    merge(names, directory / "same", method="average", weights=[float(n) for n in SIZES])
    one, other = tensors(directory / "out"), tensors(directory / "same")
    assert all(torch.allclose(one[k], other[k], atol=1e-7) for k in one)
    with pytest.raises(ValueError, match="base does not say its number of training examples"):
        merge([*names, str(directory / "base")], directory / "x", method="average", weights="examples")


def test_a_revision_is_asked_for(models, monkeypatch):
    """`ID@REVISION` must reach the Hub's client, not become part of the name."""
    directory, names, _ = models
    asked = []

    def snapshot_download(repository, revision, **patterns):
        asked.append((repository, revision))
        return names[0]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    problems = []
    checkpoint = files.Checkpoint.open("me/model@v2", problems)
    assert (asked, problems, checkpoint.short_name) == ([("me/model", "v2")], [], "model")
    files.Checkpoint.open("me/model", problems)
    assert asked[-1] == ("me/model", None)


def test_merging_in_memory_is_merging_to_disk(models):
    """A sweep's previews must be what the merge then writes."""
    directory, names, _ = models
    plan = make_plan(names, str(directory / "base"), method="uncertainty", weights=[0.5, 1.0, 2.0])
    merge(names, directory / "out", base_model=directory / "base", weights=[0.5, 1.0, 2.0])
    state, written = engine.merged_state_dict(plan), tensors(directory / "out")
    assert state.keys() == written.keys()
    assert all(torch.equal(state[k], written[k]) for k in written)


def test_a_sweep_looks_at_every_weight(classifiers):
    """Each point's metrics must be those of the merge with its weights."""
    names = [str(classifiers / n) for n in ("films", "books")]
    plan = make_plan(names, None, method="gaussian")
    model, tokenizer = load_checkpoint(names[0])
    batches = load_batches(classifiers / "films.jsonl", model, tokenizer)
    points = sweep(plan, {"films": lambda m: evaluate(m, batches)}, steps=2)
    assert [p["weights"] for p in points] == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    for name, point in zip(names, (points[0], points[2]), strict=True):
        assert point["metrics"]["films"] == pytest.approx(evaluate(load_checkpoint(name)[0], batches))
    best = max(p["score"] for p in points)
    assert [p["pareto"] for p in points] == [p["score"] == best for p in points]


def test_a_merge_that_broke_is_never_the_best(classifiers):
    """No number is below NaN: a merge without any perplexity would be on the front, and be chosen."""
    plan = make_plan([str(classifiers / n) for n in ("films", "books")], None, method="gaussian")
    values = iter([math.nan, 3.0, 2.0])
    points = sweep(plan, {"films": lambda m: {"perplexity": next(values)}}, steps=2)
    assert [p["pareto"] for p in points] == [False, False, True]
    assert max(points, key=lambda p: p["score"]) is points[2]


def test_the_sweeps_figure_names_the_metrics(tmp_path, monkeypatch):
    """A data set's name alone does not say whether 0.4 is an accuracy or a loss."""
    drawn = []
    monkeypatch.setattr("hf_ivon.plots.trade_offs", lambda points, best, path: drawn.extend(points))
    metrics = {"films": {"accuracy": 0.4, "nll": 0.9}, "scores": {"mse": 0.3}}
    _keep_sweep([{"weights": [1.0, 0.0], "metrics": metrics, "score": 0.05, "pareto": True}], tmp_path)
    assert drawn == [{"films (accuracy)": 0.4, "scores (mse)": 0.3}]


def test_grid_and_front():
    """All weights that add up to 1, and the points that no other beats; equal points are both on the front."""
    found = list(grid(3, 4))
    assert len(found) == len({tuple(p) for p in found}) == 15
    assert all(sum(p) == 1 for p in found)
    assert pareto([[1, 2], [1, 2], [0, 3], [0, 2]]) == [True, True, True, False]


def test_the_sweep_command(classifiers):
    """One command: table, figure, numbers, and the merge with the best weights; mistakes are one line."""
    start = ["merge", "--models", classifiers / "films", classifiers / "books", "--base-model", classifiers / "base"]
    start += ["--output-dir", classifiers / "out", "--sweep", 2]
    result = invoke(*start)
    assert result.exit_code == 2
    assert "`data` must be given for a sweep as NAME=FILE" in result.output
    data = [f"{name}={classifiers / name}.jsonl" for name in ("films", "books")]
    result = invoke(*start, "--data", *data, "--scale", 2)
    assert result.exit_code == 0, result.output
    assert "on the Pareto front" in result.output
    points = json.loads((classifiers / "out" / "sweep.json").read_text())
    best = max(points, key=lambda p: p["score"])["weights"]
    assert json.loads((classifiers / "out" / "merge_report.json").read_text())["weights"] == best
    assert sum(best) == 2
    assert (classifiers / "out" / "sweep.png").stat().st_size > 1000


def test_what_cannot_be_swept_is_said_before_the_data_are_read(classifiers, monkeypatch):
    """Models with a head at random would be compared, and adapters end in an error after everything was loaded."""
    monkeypatch.setattr("hf_ivon.data.load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    start = ["merge", "--models", classifiers / "films", classifiers / "books", "--method", "average", "--sweep", 1]
    start += ["--output-dir", classifiers / "out", "--data", f"films={classifiers / 'films.jsonl'}"]
    for flags in (["--adapters", "concat"], ["--into-base"]):
        result = invoke(*start, *flags)
        assert result.exit_code == 2
        assert "`adapters` and `into_base` must be left out in a sweep" in result.output
    config = BertConfig.from_pretrained(classifiers / "books", num_labels=3)
    shutil.rmtree(classifiers / "books")
    BertForSequenceClassification(config).save_pretrained(classifiers / "books")
    result = invoke(*start, "--heads", "drop")
    assert result.exit_code == 2
    assert "would have new weights at random for classifier.bias, classifier.weight" in result.output
    for name in ("films", "books"):
        model = get_peft_model(tiny.bert(), LoraConfig(target_modules=["query"], r=2))
        shutil.rmtree(classifiers / name)
        model.save_pretrained(classifiers / name)
    result = invoke(*start)
    assert result.exit_code == 2
    assert "Adapters cannot be merged in a sweep, which evaluates whole models" in result.output


def test_the_largest_file_can_be_given_in_bytes(classifiers):
    """The function takes bytes, and the command would call them a unit that it does not know."""
    start = ["merge", "--models", classifiers / "films", classifiers / "books", "--method", "average"]
    result = invoke(*start, "--output-dir", classifiers / "out", "--max-shard-size", "1000")
    assert result.exit_code == 0, result.output
    assert (classifiers / "out" / "model.safetensors.index.json").exists()
    for wrong in ("0", "abc", "-1", "5 GiB", "0GB"):
        result = invoke(*start, "--output-dir", classifiers / "no", "--max-shard-size", wrong)
        assert result.exit_code == 2
        assert "`max_shard_size` must be a number of bytes" in result.output


def test_one_string_is_no_list_of_models(models):
    """Each of its characters would be looked for on the Hub."""
    directory, names, _ = models
    for wrong in (names[0], Path(names[0])):
        with pytest.raises(TypeError, match=r"`models` must be a list of directories or repositories, got "):
            merge(wrong, directory / "out", method="average")


def test_the_card_names_what_was_merged(models):
    """On the Hub a merge without its sources is a riddle; local paths are no links."""
    directory, names, _ = models
    merge(names, directory / "out", base_model=directory / "base", weights=[1.0, 0.5, 2.0])
    text = (directory / "out" / "README.md").read_text()
    assert text.startswith("---\ntags:\n- merge\n- hf_ivon\n---\n")
    assert f"- {names[1]}, weight 0.5" in text
    rows = re.findall(r"^\| bert\.encoder\.layer\.0 \| (.*)% \| (.*)% \| (.*)% \|$", text, re.M)
    assert len(rows) == 1
    assert sum(map(float, rows[0])) == pytest.approx(100, abs=0.2)


def test_a_broken_file_of_a_model_is_named(models):
    """One of five downloads is cut off: a bare JSON error would not say which to fetch again."""
    directory, names, _ = models
    adapter = directory / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": ')
    checkpoint = files.Checkpoint.open(str(adapter), [])
    with pytest.raises(ValueError, match=r"model .*adapter cannot be used: adapter_config.json is not readable JSON"):
        checkpoint.json("adapter_config.json")
    assert checkpoint.json("config.json") == {}


LAYOUT = {
    "wide": (torch.bfloat16, (40, 3)),
    "none": (torch.float32, (0, 2)),
    "scalar": (torch.int64, ()),
    "long": (torch.float32, (500,)),
}


def values_of(layout):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul(9).to(dtype) for name, (dtype, shape) in layout.items()}


@pytest.mark.parametrize("max_shard_size", [2**40, 300])
def test_rows_are_written_in_any_order_from_any_thread(tmp_path, max_shard_size):
    """Threads write what they have merged when they have it; each row must be where a reader looks for it."""
    values = values_of(LAYOUT)
    pieces = [(name, i, min(i + 7, len(t))) for name, t in values.items() if t.ndim for i in range(0, len(t), 7)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(1)).tolist()
    with files.Writer(tmp_path, "model", LAYOUT, {"format": "pt"}, max_shard_size) as writer:
        writer.write("scalar", values["scalar"])
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(writer.write, n, values[n][a:b], a) for n, a, b in (pieces[i] for i in order)]
        assert all(future.result() is None for future in done)
        writer.write("none", values["none"])  # after the file is complete
    problems = []
    found = TensorFiles(tmp_path, "model", problems)
    assert problems == []
    assert (len(found.files) > 1) == (max_shard_size == 300)
    for name, expected in values.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
        for a, b in [(3, 5), (38, 60), (0, 1)] if expected.ndim else [(0, 1)]:
            assert torch.equal(found.rows(name, a, b), expected[a:b] if expected.ndim else expected)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
def test_the_disk_reads_ahead_what_will_be_asked_for(tmp_path, monkeypatch):
    """A wrong range would read other bytes from the disk, and the merge would wait for its own."""
    values = {"first": torch.arange(5.0), "second": torch.arange(24.0).view(8, 3), "scalar": torch.tensor(1.0)}
    save_file(values, tmp_path / "model.safetensors")
    content, asked = (tmp_path / "model.safetensors").read_bytes(), []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    found = TensorFiles(tmp_path, "model", [])
    found.expect("second", 2, 6)
    found.expect("scalar", 0, 1)
    ((offset, length),) = asked
    assert content[offset : offset + length] == values["second"][2:6].numpy().tobytes()


def test_a_file_that_is_not_complete_is_an_error(tmp_path):
    """A merge with zeros in place of rows would look like a model."""
    values = values_of(LAYOUT)
    writer = files.Writer(tmp_path, "model", LAYOUT, {"format": "pt"}, 2**40)
    with pytest.raises(RuntimeError, match="Not everything was written into model.safetensors"), writer:
        writer.write("wide", values["wide"][:39])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt), files.Writer(tmp_path, "model", LAYOUT, {}, 2**40) as writer:
        writer.write("wide", values["wide"])
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="closed file"):
        writer.write("scalar", values["scalar"])


def test_a_disk_that_fails_later_is_an_error(tmp_path, monkeypatch):
    """The system takes what is written before the disk has it: a merge must not be called whole before."""

    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match="No space left"),
        files.Writer(tmp_path, "model", LAYOUT, {"format": "pt"}, 2**40) as writer,
    ):
        for name, tensor in values_of(LAYOUT).items():
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="closed file"):
        writer._shards[0]._file.write(b"")


def test_a_file_that_ends_while_it_is_read_is_an_error(tmp_path):
    """A download that goes on, or a full disk elsewhere, must not become weights of zero."""
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    found = TensorFiles(tmp_path, "model", [])
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(OSError, match="ended while `a` was read"):
        found.rows("a", 0, 100)


def test_a_merge_that_fails_closes_its_threads_first(models, monkeypatch):
    """A thread that still writes when the files are closed may write into another file that was opened since."""
    directory, names, _ = models
    events = []
    original, close = files.Writer.write, files.Writer.__exit__

    def write(self, name, rows, start=0):
        time.sleep(0.01)
        original(self, name, rows, start)
        events.append("written")

    def stop(self, kind, error, trace):
        events.append("closed")
        return close(self, kind, error, trace)

    def fail(self, other):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Writer, "write", write)
    monkeypatch.setattr(files.Writer, "__exit__", stop)
    monkeypatch.setattr(report.TensorStatistics, "absorb", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(names, directory / "out", method="average")
    time.sleep(0.1)
    assert "written" in events
    assert events.index("closed") > max(i for i, event in enumerate(events) if event == "written")
    assert not list(directory.glob(".out*"))


def test_what_a_model_is_used_with_comes_along(tmp_path):
    """A merge without its licence, template or tied weights would be another model than those that it is made of."""
    models = [tmp_path / "a", tmp_path / "b"]
    beside = {"LICENSE": "as is", "chat_template.jinja": "{{ messages }}", "generation_config.json": '{"top_k": 3}'}
    for seed, directory in enumerate(models):
        torch.manual_seed(seed)
        GPT2LMHeadModel(tiny.gpt2().config).save_pretrained(directory)
        for name, text in {**beside, "optimizer.pt": "a state"}.items():
            (directory / name).write_text(text)
        weights = load_file(directory / "model.safetensors")
        save_file({**weights, "steps": torch.tensor([7])}, directory / "model.safetensors", {"format": "pt"})
    merge(models, tmp_path / "out", method="average")
    assert {name: (tmp_path / "out" / name).read_text() for name in beside} == beside
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert load_file(tmp_path / "out" / "model.safetensors")["steps"].tolist() == [7]

    save_file({**weights, "steps": torch.tensor([8])}, models[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="`steps` holds no real numbers and differs between the models"):
        merge(models, tmp_path / "other", method="average")
    assert not (tmp_path / "other").exists()
