"""The GLUE recipe end to end, on a tiny BERT with a tiny vocabulary."""

import json

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from hf_ivon import load_posterior
from recipes import demo, glue_tasks, run_glue
from recipes.common import RecipeError

WORDS = ["good", "bad", "film", "book", "very", "not", "a", "the", "is"]


def make_model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(directory)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=32)  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(tmp_path):
    return make_model(tmp_path)


def write_rows(tmp_path, task, change=lambda row: row, num=24):
    flags = []
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        rows = []
        for i in range(num):
            row = {c: " ".join(generator.choice(WORDS, 4)) for c in task.columns}
            row["label"] = i % task.num_labels if task.num_labels > 1 else float(i % 6)
            rows.append(change(row))
        path = tmp_path / f"{split}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        flags += [f"--{split}_file", str(path)]
    return flags


def run(tmp_path, model_dir, name, files, *flags):
    base = {
        "task_name": name,
        "model_name_or_path": model_dir,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "eval_num_samples": 2,
    }
    return run_glue.main([*demo.flags(base), *files, *flags])


@pytest.mark.parametrize("name", ["cola", "mnli", "mrpc", "stsb"])
def test_every_kind_of_task_runs(tmp_path, model_dir, name):
    """One sentence, pairs, three classes, regression: each has its own columns, head and metric."""
    task = glue_tasks.TASKS[name]
    results = run(tmp_path, model_dir, name, write_rows(tmp_path, task), "--ivon_ess", "100")
    assert task.metric in results["mean"]
    assert set(results["mean"]) == set(results["averaged"])
    quality = "mse" if task.num_labels == 1 else "nll"
    assert results["mean"][quality] != results["averaged"][quality]
    assert load_posterior(tmp_path / "out").config.num_examples == 24
    assert json.loads((tmp_path / "out" / "results.json").read_text())["optimizer"] == "ivon"


def test_adamw_is_one_flag_away(tmp_path, model_dir):
    """The baseline runs through the same script, without a posterior."""
    files = write_rows(tmp_path, glue_tasks.TASKS["rte"])
    results = run(tmp_path, model_dir, "rte", files, "--optim", "adamw_torch")
    assert "averaged" not in results
    assert not (tmp_path / "out" / "posterior.safetensors").exists()


def missing_column(row):
    return {k: v for k, v in row.items() if k != "sentence2"}


@pytest.mark.parametrize(
    ("task", "change", "flags", "message"),
    [
        ("rte", missing_column, [], r"lacks the column\(s\) sentence2"),
        ("imdb", None, [], "`task_name` must be one of cola, .*, got 'imdb'"),
        ("rte", lambda row: {**row, "label": 2}, [], "must be 0 to 1 for rte, got 2"),
        ("rte", lambda row: {**row, "label": -1}, [], r"drop rows without a label \(-1\)"),
        ("stsb", lambda row: {**row, "label": "high"}, [], "must be numbers, got 'high'"),
        ("rte", None, ["--max_train_samples", "0"], "the training split is empty"),
        ("rte", None, ["--ivon_ess", "many"], "`ess` must be a number|must be a positive number, got 'many'"),
    ],
)
def test_bad_input_is_one_error_before_training(tmp_path, model_dir, task, change, flags, message):
    """Wrong labels would crash in the middle of the first epoch, or train on nonsense."""
    files = write_rows(tmp_path, glue_tasks.TASKS.get(task, glue_tasks.TASKS["rte"]), change or (lambda row: row))
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, model_dir, task, files, *flags)
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_size_is_refused_or_replaced(tmp_path, model_dir):
    """A model finetuned on two classes cannot serve three; whether its head may go is the user's choice."""
    BertForSequenceClassification.from_pretrained(model_dir, num_labels=2).save_pretrained(model_dir)
    files = write_rows(tmp_path, glue_tasks.TASKS["mnli"])
    with pytest.raises(RecipeError, match="has 2 outputs, and mnli needs 3. Pass --new_head true"):
        run(tmp_path, model_dir, "mnli", files)
    assert "averaged" in run(tmp_path, model_dir, "mnli", files, "--new_head", "true")


def test_metrics_are_those_of_glue():
    """Hand-computed values; a metric that is off by its definition makes every table wrong."""
    predictions, labels = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])
    assert glue_tasks.task_metrics("rte", predictions, labels) == {"accuracy": 0.75}
    assert glue_tasks.task_metrics("mrpc", predictions, labels)["f1"] == pytest.approx(0.8)
    # MCC = (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = (2*1 - 1*0) / sqrt(3*2*2*1)
    assert glue_tasks.task_metrics("cola", predictions, labels)["matthews_correlation"] == pytest.approx(2 / 12**0.5)
    stsb = glue_tasks.task_metrics("stsb", np.array([1.0, 2.0, 30.0]), np.array([0.0, 1.0, 2.0]))
    assert stsb["spearmanr"] == pytest.approx(1.0)
    assert stsb["pearson"] < 0.95
