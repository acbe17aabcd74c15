"""The recipe on calibration and out-of-domain detection, end to end on tiny models."""

import json

import pytest
import torch
from torch import nn

from recipes import ood_study
from recipes.common import RecipeError
from tests.test_run_glue import WORDS, model_dir

__all__ = ["model_dir"]


@pytest.fixture
def files(tmp_path):
    """A training and a test file in sst2's columns, and texts of another domain, one of which is trained on."""
    texts = {
        "train": [f"{WORDS[i % 9]} film {i}" for i in range(16)],
        "test": [f"{WORDS[i % 9]} book {i}" for i in range(12)],
        "other": ["the the the", *[f"not {i} a" for i in range(8)], "GOOD  film, 0!"],
    }
    for name, sentences in texts.items():
        column = "text" if name == "other" else "sentence"
        rows = [{column: sentence, "label": i % 2} for i, sentence in enumerate(sentences)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(files, model_dir, *flags):
    arguments = ["--train_file", str(files / "train.jsonl"), "--test_file", str(files / "test.jsonl")]
    arguments += ["--ood", f"other={files / 'other.jsonl'}", "--model_name_or_path", str(model_dir)]
    arguments += ["--output_dir", str(files / "out"), "--members", "2", "--max_length", "16"]
    arguments += [
        "--ivon",
        "--learning_rate 0.1 --ivon_ess 1e3",
        *flags,
        "--",
        "--max_steps",
        "2",
        "--use_cpu",
        "true",
    ]
    ood_study.main([*arguments, "--per_device_train_batch_size", "4", "--report_to", "none"])
    return json.loads((files / "out" / "results.json").read_text())


def test_every_method_is_measured_on_the_same_rows_and_nothing_is_trained_twice(files, model_dir, capsys):
    """A method that is left out, or gets other rows, would be compared wrongly."""
    rows = run(files, model_dir)
    assert list(rows) == [
        "AdamW",
        "MC dropout, 16 passes",
        "ensemble of 2",
        "IVON at the mean",
        *(f"IVON, {n} samples" for n in ood_study.SAMPLES),
        "Multi-IVON of 2, 16 samples each",
    ]
    assert all({"accuracy", "nll", "ece", "brier", "other auroc", "other fpr95"} <= set(row) for row in rows.values())
    kept = [json.loads(line)["sentence"] for line in (files / "out" / "other.jsonl").open()]
    assert len(kept) == 9
    assert "GOOD  film, 0!" not in kept, "a training text is not out of domain"
    stamps = {f: f.stat().st_mtime_ns for f in (files / "out").rglob("*.safetensors")}
    again = run(files, model_dir)
    assert stamps == {f: f.stat().st_mtime_ns for f in (files / "out").rglob("*.safetensors")}
    for name, row in rows.items():
        assert {k: v for k, v in again[name].items() if k != "seconds"} == {
            k: v for k, v in row.items() if k != "seconds"
        }, name
    assert "Multi-IVON" in capsys.readouterr().out
    assert (files / "out" / "samples.png").stat().st_size > 0


class Dropped(nn.Module):
    """Logits through dropout; batch normalization, which must not see training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(2), nn.Dropout(0.5)

    def forward(self, x):
        return type("Output", (), {"logits": self.dropout(self.norm(x))})


def test_dropout_is_on_and_nothing_else_is():
    """MC dropout with dropout off is the plain model; with statistics of the batch it is another one."""
    model = Dropped().eval()
    batches = [{"x": torch.tensor([[2.0, -1.0]]), "labels": torch.tensor([0])}]
    averaged = ood_study.with_dropout(model, batches, 4000).probabilities
    scale = (1.0 + model.norm.eps) ** -0.5
    logits = torch.tensor([[a, b] for a in (4.0 * scale, 0.0) for b in (-2.0 * scale, 0.0)], dtype=torch.float64)
    expected = logits.softmax(-1).mean(0)  # each unit is kept, and doubled, half of the time
    # The probabilities have a standard deviation of 0.2, so that 0.02 is 6 standard errors of 4,000 passes.
    torch.testing.assert_close(averaged[0], expected, rtol=0.0, atol=0.02)
    assert not model.training
    assert not model.dropout.training
    assert torch.equal(model.norm.running_mean, torch.zeros(2))


def test_a_file_without_a_name_is_refused(files, model_dir):
    """Columns of the table are named after the files."""
    with pytest.raises(RecipeError, match="takes NAME=FILE"):
        run(files, model_dir, "--ood", "other.jsonl")


def test_a_file_without_texts_is_named(files, model_dir):
    """A news file with a column of its own name would end in a traceback that names neither file nor column."""
    (files / "other.jsonl").write_text('{"headline": "rome", "label": 1}\n')
    message = (
        r"other\.jsonl' must have texts in a column sentence, text or content, got the column\(s\) headline, label"
    )
    with pytest.raises(RecipeError, match=message):
        run(files, model_dir)
    (files / "test.jsonl").write_text('{"text": "rome"}\n')
    with pytest.raises(RecipeError, match=r"test\.jsonl' lacks the column\(s\) label; it has text"):
        run(files, model_dir)


def test_empty_lines_are_no_examples(tmp_path):
    """A book has empty lines; each would be an example that is told from films without a word."""
    (tmp_path / "book.txt").write_text("call me\n\nishmael\n")
    assert [row["sentence"] for row in ood_study.read(str(tmp_path / "book.txt"), [])] == ["call me", "ishmael"]


def test_models_and_batches_go_to_the_accelerator(monkeypatch):
    """On the CPU the study of a real model takes days, and with the batches left there MC dropout fails."""
    moved = []
    monkeypatch.setattr(ood_study, "load_model", lambda directory: type("Model", (), {"to": moved.append}))
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        ood_study.load(None)
    assert moved == ["cuda", "cpu"]

    class Meta(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, device="meta"))

        def forward(self, x):
            return type("Output", (), {"logits": torch.zeros(len(x), 2 if x.device.type == "meta" else 0)})

    batches = [{"x": torch.ones(3, 2), "labels": torch.zeros(3)}]
    assert ood_study.with_dropout(Meta(), batches, 1).probabilities.shape == (3, 2)
