"""The command `hf-ivon merge`: no option is ignored, and what is printed is true."""

import json

import peft
import pytest
import torch
from transformers import BertForSequenceClassification

from hf_ivon.cli.merge import spread
from hf_ivon.data import evaluate, load_batches, load_checkpoint
from tests import tiny
from tests.classifiers import classifiers, invoke
from tests.test_merge import save, tensors

__all__ = ["classifiers"]


def start(directory, *more):
    models = [directory / "films", directory / "books"]
    return ["merge", "--models", *models, "--method", "average", "--output-dir", directory / "out", *more]


def error(directory, *more):
    """Return what a command says that must fail without writing anything."""
    result = invoke(*start(directory, *more))
    assert result.exit_code == 2, result.output
    assert not (directory / "out").exists()
    return " ".join(result.output.replace("│", "").split())


def relabelled(directory, name, num_labels=2):
    """Save a classifier whose classes are called otherwise: of two, in another order."""
    generator = torch.Generator().manual_seed(7)
    model = BertForSequenceClassification.from_pretrained(
        directory / name, num_labels=num_labels, ignore_mismatched_sizes=True
    )
    model.config.label2id = {"great": 0, "awful": 1, "neither": 2} if num_labels == 3 else {"awful": 0, "great": 1}
    model.config.id2label = {i: label for label, i in model.config.label2id.items()}
    save(model, directory / name, 100, generator)


@pytest.mark.parametrize("heads", ["separate", "keep:books"])
def test_labels_are_those_of_the_model_that_is_evaluated(classifiers, heads):
    """With the first model's names of classes the second one's labels were unknown, or of other classes."""
    relabelled(classifiers, "films", num_labels=3)
    relabelled(classifiers, "books")
    rows = [json.loads(line) for line in (classifiers / "books.jsonl").read_text().splitlines()]
    for name, labels in (("films", ("awful", "neither")), ("books", ("great", "awful"))):
        text = "\n".join(json.dumps({**row, "label": labels[row["label"]]}) for row in rows)
        (classifiers / f"{name}.jsonl").write_text(text)
    files = [f"{name}={classifiers / name}.jsonl" for name in ("films", "books")]
    data = files if heads == "separate" else files[1:]
    result = invoke(*start(classifiers, "--heads", heads, "--sweep", 1, "--data", *data))
    assert result.exit_code == 0, result.output
    points = json.loads((classifiers / "out" / "sweep.json").read_text())
    model, tokenizer = load_checkpoint(classifiers / "books")
    expected = evaluate(model, load_batches(classifiers / "books.jsonl", model, tokenizer))
    assert points[-1]["weights"] == [0.0, 1.0]
    assert points[-1]["metrics"]["books"] == pytest.approx(expected)


def test_products_are_counted_as_adapters(tmp_path):
    """ "0 of 0 tensors (0.0 MiB) merged" looks as if nothing had been done."""
    for name, rank in (("films", 2), ("books", 3)):
        model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(target_modules=["query"], r=rank))
        save(model, tmp_path / name, 10, torch.Generator().manual_seed(rank))
    flags = start(tmp_path, "--adapters", "concat")
    result = invoke(*flags, "--dry-run")
    assert "The products of 2 adapters (concat) would be merged by average." in result.output
    result = invoke(*flags)
    assert f"The products of 2 adapters (concat) merged into {tmp_path / 'out'} by average." in result.output
    assert "0 of 0" not in result.output
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["products"] == "concat"


@pytest.mark.parametrize("option", ["--weights", "--data", "--text-columns", "--models"])
def test_a_list_without_values_is_an_error(classifiers, option):
    """`--weights $W` with an empty variable merged with weights 1, as if none had been wanted."""
    assert f"Option '{option}' requires an argument" in error(classifiers, option)
    assert f"Option '{option}' requires an argument" in error(classifiers, option, "--seed", "1", "--dry-run")
    assert spread(["merge", "--weights", "--models", "a", "--data"]) == ["merge", "--models", "a", "--weights"]
    assert spread(["merge", "--weights=1", "--models", "a"]) == ["merge", "--weights=1", "--models", "a"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--data", "films=films.jsonl"], "data"),
        (["--scale", "2"], "scale"),
        (["--text-columns", "text"], "text_columns"),
        (["--max-length", "64"], "max_length"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_options_of_a_sweep_need_one(classifiers, flags, name, more):
    """Whoever forgets --sweep gets a merge with weights 1, and thinks that they were tuned."""
    assert f"`{name}` must be left out without a sweep" in error(classifiers, *flags, *more)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_weights_are_not_given_to_a_sweep(classifiers, more):
    """They were ignored."""
    flags = ["--sweep", "2", "--data", f"films={classifiers / 'films.jsonl'}", "--weights", "1", "2"]
    assert "`weights` must be left out in a sweep" in error(classifiers, *flags, *more)


def test_a_dry_run_looks_at_the_sweep(classifiers, monkeypatch):
    """It said that all was well, and the sweep then ended at its first step."""
    monkeypatch.setattr("hf_ivon.data.load_checkpoint", lambda *_: pytest.fail("a model was loaded"))
    dry = ["--dry-run", "--sweep", "2"]
    films = f"films={classifiers / 'films.jsonl'}"
    assert "`data` must be given for a sweep as NAME=FILE, got none" in error(classifiers, *dry)
    assert "none.jsonl, which are not there" in error(classifiers, *dry, "--data", films, "b=none.jsonl")
    assert "by different names" in error(classifiers, *dry, "--data", films, films)
    assert "`steps` and `scale` must be positive" in error(classifiers, *dry, "--data", films, "--scale", "1e39")
    assert "must be left out in a sweep" in error(classifiers, *dry, "--data", films, "--into-base")
    result = invoke(*start(classifiers, *dry, "--data", films))
    assert result.exit_code == 0, result.output
    assert "would be merged by average" in result.output
    relabelled(classifiers, "books", num_labels=3)
    assert "would have new weights at random" in error(classifiers, *dry, "--data", films, "--heads", "drop")
    other = f"other={classifiers / 'films.jsonl'}"
    said = error(classifiers, *dry, "--data", films, other, "--heads", "separate")
    assert "data must be named after a model (films, books), got 'other'" in said


def test_the_scale_of_a_sweep_is_1(classifiers):
    """What is not given must be what the help says."""
    result = invoke(*start(classifiers, "--sweep", "1", "--data", f"films={classifiers / 'films.jsonl'}"))
    assert result.exit_code == 0, result.output
    assert sum(json.loads((classifiers / "out" / "merge_report.json").read_text())["weights"]) == 1
    assert tensors(classifiers / "out")
