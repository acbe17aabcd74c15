"""The recipe on leave-one-out estimates and wrong labels, end to end on tiny models."""

import json

import pytest
import torch

from recipes import sensitivity_study
from recipes.common import RecipeError
from tests.test_ood_study import files
from tests.test_run_glue import model_dir

__all__ = ["files", "model_dir"]


def run(files, model_dir, *flags):
    arguments = ["--train_file", files / "train.jsonl", "--test_file", files / "test.jsonl", "--output_dir"]
    arguments += [files / "out", "--model_name_or_path", model_dir, "--max_length", 16, *flags, "--"]
    arguments += ["--num_train_epochs", 2, "--use_cpu", "true", "--per_device_train_batch_size", 4]
    return sensitivity_study.main([*map(str, arguments), "--ivon_ess", "16", "--report_to", "none"])


def test_every_epoch_is_measured(files, model_dir):
    """Estimates must be of the model after each epoch, and of the labels that it was trained on."""
    rows = run(files, model_dir, "--wrong_labels", 0.25, "--ess_scale", 1, 1e9)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["left out, 1"] > row["train"]
        assert row["left out, 1e+09"] == pytest.approx(row["train"], rel=1e-4)
        assert 0 <= row["by sensitivity"] <= 1
        assert 0 <= row["by loss"] <= 1
    assert rows[0]["train"] != rows[1]["train"]
    labels = [json.loads(line)["label"] for line in (files / "out" / "train.jsonl").open()]
    given = {r["sentence"]: r["label"] for r in map(json.loads, (files / "train.jsonl").open())}
    trained = [json.loads(line)["sentence"] for line in (files / "out" / "train.jsonl").open()]
    assert sum(given[sentence] != label for sentence, label in zip(trained, labels, strict=True)) == 4
    assert json.loads((files / "out" / "results.json").read_text()) == {"rows": rows}
    assert (files / "out" / "loo.png").stat().st_size > 1000
    assert run(files, model_dir, "--wrong_labels", 0.25, "--ess_scale", 1, 1e9) == rows, "nothing is trained twice"


def test_the_expected_loss_is_that_of_many_draws():
    """The estimate is of rows with wrong labels; the loss on clean ones would be another number."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    labels = torch.randint(3, (50,), generator=generator)
    losses = []
    for _ in range(4000):
        moved = torch.rand(50, generator=generator) < 0.2
        moves = torch.randint(1, 3, (50,), generator=generator)
        noisy = torch.where(moved, (labels + moves) % 3, labels)
        losses.append(-p.gather(1, noisy[:, None]).log().mean())
    losses = torch.stack(losses)
    error = 5 * float(losses.std()) / len(losses) ** 0.5  # five standard errors
    assert sensitivity_study.expected_loss(p, labels, 0.2) == pytest.approx(float(losses.mean()), abs=error)


def test_a_share_that_is_none_is_refused(files, model_dir):
    """All labels wrong would be a dataset with right labels."""
    with pytest.raises(RecipeError, match=r"must be in \[0, 1\), got 1.0"):
        run(files, model_dir, "--wrong_labels", 1)
