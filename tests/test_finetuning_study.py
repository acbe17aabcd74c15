"""The recipe that finetunes on eight datasets, end to end on a tiny BERT."""

import gzip
import json
import re

import pytest

from recipes import finetuning_study, merge_sentiment
from recipes.glue_tasks import TASKS
from tests.test_merge_recipes import data
from tests.test_run_glue import WORDS, model_dir

__all__ = ["data", "model_dir"]


def write_glue(directory):
    for task in finetuning_study.GLUE:
        (directory / task).mkdir()
        for split in ("train", "validation"):
            rows = [
                {c: f"{split} {WORDS[i % 5]} {i}" for c in TASKS[task].columns} | {"label": i % 2} for i in range(12)
            ]
            with gzip.open(directory / task / f"{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(map(json.dumps, rows)))


def test_eight_datasets(tmp_path, data, model_dir, capsys):
    """Each dataset is trained by both optimizers from the same weights and measured; a second run repeats nothing."""
    write_glue(data)
    flags = ["--data_dir", data, "--model_name_or_path", model_dir, "--output_dir", tmp_path / "out", "--seeds", "0"]
    flags += [
        "--max_train_samples",
        "8",
        "--max_eval_samples",
        "8",
        "--examples",
        "4",
        "--samples",
        "2",
        "--max_length",
    ]
    flags += ["16", "--", "--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
    flags = [str(flag) for flag in [*flags, "--use_cpu", "true", "--disable_tqdm", "true"]]
    found = finetuning_study.main(flags)
    printed = capsys.readouterr().out
    assert list(found) == [*merge_sentiment.TASKS, *finetuning_study.GLUE]
    for of_task in found.values():
        qualities = (of_task["adamw"]["mean"], of_task["ivon"]["mean"], of_task["ivon"]["averaged"])
        assert all(0 <= quality[m] < 10 for quality in qualities for m in finetuning_study.METRICS)
        assert qualities[1] != qualities[2], "nothing was averaged"
        assert -1 <= of_task["ivon"]["rank correlation"] <= 1
    assert re.search(r" of 8 datasets, in \d of 8 runs", printed)
    (averages,) = [line.split() for line in printed.splitlines() if line.startswith("average")]
    accuracies = [of_task["adamw"]["mean"]["accuracy"] for of_task in found.values()]
    assert float(averages[3]) == pytest.approx(sum(accuracies) / 8, abs=1e-3)
    kept = json.loads((tmp_path / "out" / "data" / "qqp" / "test.jsonl").read_text().splitlines()[0])
    assert kept["question1"].startswith("validation"), "the test rows are trained on"
    (tmp_path / "out" / "pretrained-0" / "imdb" / "posterior.safetensors").unlink()  # would be missed if read again
    assert finetuning_study.main(flags) == found
    (card,) = (tmp_path / "out" / "cards-0").glob("*-qnli-ivon/README.md")
    assert "8 rows of its validation split" in card.read_text(), "GLUE has no labels for its test split"
    measured = found["qnli"]
    for quality in (measured["ivon"]["mean"], measured["ivon"]["averaged"]):
        assert f"value: {quality['nll']}" in card.read_text(), "the card has other numbers than the table"
    assert f"NLL {measured['adamw']['mean']['nll']:.3f}".lower() in card.read_text()
    assert "--max_steps 2" in card.read_text()
    assert str(tmp_path) not in card.read_text().split("---")[1], "a path of a machine is no metadata"
    # The models are where the merging recipe looks for them.
    assert (tmp_path / "out" / "pretrained-0" / "sst2" / "results.json").is_file()


def test_averaging_must_beat_both():
    """A dataset would count as won where averaging only mends what training with noise has cost."""
    good, bad = {"nll": 0.4, "ece": 0.05}, {"nll": 0.5, "ece": 0.06}
    assert finetuning_study.is_better({"adamw": {"mean": bad}, "ivon": {"mean": bad, "averaged": good}})
    for adamw in (good, {"nll": 0.5, "ece": 0.04}):
        assert not finetuning_study.is_better({"adamw": {"mean": adamw}, "ivon": {"mean": bad, "averaged": good}})
