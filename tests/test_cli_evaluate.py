"""`hf-ivon evaluate`: the numbers of a checkpoint, at its mean and averaged."""

import json
import re
import sys

import pytest
import torch

from hf_ivon import data, json_files, load_posterior, metrics, plots, posterior_predict
from hf_ivon.data import evaluate, load_batches, load_checkpoint
from tests import tiny
from tests.classifiers import classifiers, invoke
from tests.test_merge import posterior_of

__all__ = ["classifiers"]


def test_the_evaluate_command(classifiers):
    """What a downloaded checkpoint is worth: the command's numbers must be those of the functions, in both columns."""
    model, output = classifiers / "films", classifiers / "numbers" / "films.json"
    start = ["evaluate", model, "--data", classifiers / "films.jsonl", "--num-samples", 5, "--ess-scale", 0.5]
    result = invoke(*start, "--ood-data", classifiers / "books.jsonl", "--output", output, "--plots", classifiers)
    assert result.exit_code == 0, result.output
    results = json.loads(output.read_text())
    loaded, tokenizer = load_checkpoint(model)
    batches = load_batches(classifiers / "films.jsonl", loaded, tokenizer)
    found = posterior_predict(loaded, load_posterior(model, loaded), batches, num_samples=5, ess_scale=0.5)
    assert results["mean"]["accuracy"] == evaluate(loaded, batches)["accuracy"]
    assert results["averaged"]["brier"] == pytest.approx(metrics.brier_score(found.probabilities, found.labels))
    assert (results["num_samples"], results["ess_scale"]) == (5, 0.5)
    assert all((classifiers / f"{name}.png").stat().st_size > 1000 for name in ("reliability", "entropy", "samples"))
    assert 0 <= results["averaged"]["auroc"] <= 1
    for name, value in results["averaged"].items():
        assert re.search(rf"^{name} +{results['mean'][name]:.4f} +{value:.4f}$", result.output, re.M)
    for file in model.glob("posterior*"):
        file.unlink()
    result = invoke(*start)
    assert result.exit_code == 2
    assert "posterior_config.json is missing" in result.output


def test_the_curve_by_samples_ends_at_the_number_of_the_table(classifiers, monkeypatch):
    """A curve that was of other samples, or another metric, would say that fewer of them are enough."""
    drawn = {}
    monkeypatch.setattr(plots, "metric_by_samples", lambda curves, path, **options: drawn.update(curves, **options))
    output = classifiers / "out.json"
    result = invoke(
        *("evaluate", classifiers / "films", "--data", classifiers / "films.jsonl", "--num-samples", 5),
        *("--output", output, "--plots", classifiers / "figures"),
    )
    assert result.exit_code == 0, result.output
    results = json.loads(output.read_text())
    assert sorted(drawn["averaged"]) == [1, 2, 4, 5]
    assert drawn["averaged"][5] == results["averaged"]["nll"]
    assert drawn["references"] == {"at the mean": results["mean"]["nll"]}
    assert drawn["averaged"][1] != drawn["averaged"][5]


def test_the_other_domain_may_have_other_columns(classifiers):
    """`--text-columns` would be ignored for the other domain's file, and another column of it be read."""
    rows = [json.loads(line) for line in (classifiers / "books.jsonl").read_text().splitlines()]
    for name, change in (("both", {"note": "not a film"}), ("body", {})):
        renamed = [{("body" if name == "body" else "text"): r["text"], "label": r["label"], **change} for r in rows]
        (classifiers / f"{name}.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    numbers = []
    start = ["evaluate", classifiers / "films", "--data", classifiers / "films.jsonl", "--num-samples", 2]
    start += ["--text-columns", "text", "--output", classifiers / "out.json", "--ood-data"]
    for file, more in (("books", []), ("both", []), ("body", ["--ood-text-columns", "body"])):
        result = invoke(*start, classifiers / f"{file}.jsonl", *more)
        assert result.exit_code == 0, result.output
        numbers.append(json.loads((classifiers / "out.json").read_text()))
    assert numbers[0] == numbers[1] == numbers[2]
    named = [{**row, "label": "fiction"} for row in rows]  # the labels of another domain are not the model's
    (classifiers / "named.jsonl").write_text("\n".join(map(json.dumps, named)))
    result = invoke(*start, classifiers / "named.jsonl")
    assert result.exit_code == 0, result.output
    assert json.loads((classifiers / "out.json").read_text()) == numbers[0]
    result = invoke(*start, classifiers / "body.jsonl")
    assert result.exit_code == 2
    assert "lacks the column(s) text" in result.output
    result = invoke(*start[:-1], "--ood-text-columns", "body")
    assert "`ood_text_columns` must come with `ood_data`" in result.output


def test_options_without_effect_are_refused(tmp_path):
    """Someone who asks for figures or an early stop would wait for what never comes."""
    tiny.save_gpt2(tmp_path / "gpt2", ["one two three", "four five"], 32)
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three"}\n')
    model, _ = load_checkpoint(tmp_path / "gpt2")
    posterior_of(model, 10, torch.Generator().manual_seed(0))[0].save_pretrained(tmp_path / "gpt2")
    start = ["evaluate", tmp_path / "gpt2", "--data", tmp_path / "rows.jsonl", "--num-samples", 2]
    for flags, names in (
        (["--tolerance", 0.1], "`tolerance`"),
        (["--plots", tmp_path], "`plots`"),
        (["--ood-data", tmp_path / "rows.jsonl", "--plots", tmp_path], "`ood_data` and `plots`"),
    ):
        result = invoke(*start, *flags)
        assert result.exit_code == 2, result.output
        assert f"{names} must be left out for a language model" in result.output


@pytest.mark.parametrize("command", ["evaluate", "sensitivity"])
def test_results_have_a_place_before_they_are_computed(classifiers, monkeypatch, command):
    """An hour of predictions would end in a traceback, because a directory was given for a file, and be lost."""
    (classifiers / "file").write_text("")
    start = [command, classifiers / "films", "--data", classifiers / "films.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_checkpoint", lambda directory: pytest.fail("the work began"))
        for flags, message in (
            (["--output", classifiers], "`output` must be a file, got the directory"),
            (
                ["--output", classifiers / "file" / "out.json"],
                "`output` must be a directory that can be written into, got",
            ),
            (["--plots", classifiers / "file"], "`plots` must be a directory that can be written into, got"),
        ):
            result = invoke(*start, *flags)
            assert result.exit_code == 2, result.output
            assert message in result.output
        patch.setitem(sys.modules, "matplotlib", None)
        result = invoke(*start, "--plots", classifiers / "figures")
        assert result.exit_code == 2
        assert "Figures need `matplotlib`: pip install 'hf_ivon[plots]'" in result.output
    assert not (classifiers / "figures").exists()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("write_json", "write_json_lines"):
        monkeypatch.setattr(json_files, name, full)
    result = invoke(*start, "--output", classifiers / "out.json")
    assert result.exit_code == 2
    assert re.search(r"^(accuracy|loss) +\d", result.output, re.M)
    assert "was not written as a whole: [Errno 28] No space left on device" in result.output


@pytest.mark.parametrize("command", ["evaluate", "sensitivity"])
def test_the_model_goes_to_the_accelerator(classifiers, monkeypatch, command):
    """A machine's GPU would stand idle while its CPU takes a hundred times as long."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    assert data.best_device() == device
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert data.best_device() == torch.device("cpu")
    moved = []
    monkeypatch.setattr(data, "best_device", lambda: device)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, where: moved.append((type(model).__name__, where)))
    result = invoke(command, classifiers / "films", "--data", classifiers / "films.jsonl")
    assert result.exit_code == 0, result.output
    assert moved[-1] == ("BertForSequenceClassification", device)
