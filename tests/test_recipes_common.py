"""What the recipes share: settings files, data files, output directories, the corpus, the study driver."""

import gzip
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_ivon import IVONTrainingArguments
from recipes import common, corpus, study

RECIPES = Path(common.__file__).parent


@dataclass
class Example:
    size: int = field(default=1)
    name: str | None = field(default=None)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_flags_override_the_settings_file(tmp_path, suffix):
    """The paper's settings are files; people change one value on the command line."""
    path = tmp_path / f"settings.{suffix}"
    settings = {"_source": "a note", "size": 3, "name": "file", "optim": "ivon", "bf16": False, "learning_rate": 1e-5}
    path.write_text(json.dumps(settings))  # JSON is YAML
    example, args = common.parse_args(
        (Example, IVONTrainingArguments), [str(path), "--name", "flag", "--output_dir", str(tmp_path)]
    )
    assert (example.size, example.name) == (3, "flag")
    assert (args.optim, args.bf16, args.learning_rate) == ("ivon", False, 1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sise": 3}', "`sise` .* is not an argument. Did you mean size"),
        ("[1, 2]", "must hold an object"),
        ("{", "cannot be read"),
    ],
)
def test_bad_settings_files_are_named(tmp_path, text, message):
    """A misspelt key in a settings file would silently train with the default."""
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(common.RecipeError, match=message):
        common.parse_args((Example,), [str(path)])
    with pytest.raises(common.RecipeError, match="cannot be read"):
        common.parse_args((Example,), [str(tmp_path / "missing.json")])


def test_an_output_directory_in_use_is_refused_and_kept(tmp_path):
    """Training into a directory that holds another run would mix or destroy it."""
    (tmp_path / "precious").write_text("results")
    args = IVONTrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(common.RecipeError, match="which holds files"):
        common.check_output_dir(args)
    assert (tmp_path / "precious").read_text() == "results"
    args.resume_from_checkpoint = str(tmp_path)
    common.check_output_dir(args)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv"])
def test_rows_load_from_every_format(tmp_path, suffix):
    """GLUE and text files come as json lines, json or csv, often gzipped."""
    path = tmp_path / f"rows{suffix}"
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    lines = "\n".join(json.dumps(row) for row in rows)
    if suffix == ".csv":
        path.write_text("text,label\na,1\nb,0\n")
    elif suffix.endswith("gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines if suffix == ".jsonl" else json.dumps(rows))
    assert common.load_rows(str(path), ["text", "label"]).to_list() == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"sentence": "a"}', r"lacks the column\(s\) text; it has sentence"),
        ("rows.jsonl", "", "(is empty|cannot be read)"),
        ("rows.jsonl", "{", "cannot be read as jsonl"),
        ("rows.parquet", "x", "must be one of .json"),
        (None, None, "does not exist"),
    ],
)
def test_bad_data_files_are_named(tmp_path, name, text, message):
    """A wrong file must be one line before training, not a traceback of a library."""
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_text(text)
    with pytest.raises(common.RecipeError, match=message):
        common.load_rows(str(path), ["text"])


def test_results_are_written_whole(tmp_path):
    """A study skips runs whose results exist; half a file would be taken for a result."""
    path = common.write_results(str(tmp_path), {"x": 1.5})
    assert json.loads(path.read_text()) == {"x": 1.5}
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]


def test_corpus_is_large_and_split_without_overlap():
    """The demo trains on it; a validation document seen in training would flatter every perplexity."""
    splits = corpus.python_documentation()
    assert sum(map(len, splits["train"])) > 1_000_000
    assert sum(map(len, splits["validation"])) > 50_000
    train, validation = ({p.strip() for text in texts for p in text.split("\n\n")} for texts in splits.values())
    assert not {p for p in train & validation if len(p) >= 80}


@pytest.mark.parametrize("path", sorted((RECIPES / "settings").glob("*.json")), ids=lambda p: p.stem)
def test_settings_files_are_valid(path, tmp_path):
    """A settings file of the paper that a recipe does not accept reproduces nothing."""
    from recipes import run_clm, run_glue

    if path.stem == "ivon_lora":
        pytest.skip("run by tests/test_run_loops.py")
    if path.stem.startswith("gpt2"):
        types, required = (run_clm.ModelArguments, run_clm.DataArguments, IVONTrainingArguments), []
    else:
        types, required = (run_glue.GlueArguments, IVONTrainingArguments), ["--task_name", "mrpc"]
    more = ["--output_dir", str(tmp_path), "--use_cpu", "true", *required]
    *_, args = common.parse_args(types, [str(path), *more])
    assert ("ivon" in path.stem) == (args.optim == "ivon")
    assert args.learning_rate == json.loads(path.read_text())["learning_rate"]


def test_study_takes_medians_and_keeps_finished_runs(tmp_path, monkeypatch, capsys):
    """An interrupted study must continue, and a table of medians must be one of the right numbers."""
    calls = []

    def fake_run(command, **kwargs):
        calls.append(command)
        directory = Path(command[command.index("--output_dir") + 1])
        seed = float(command[command.index("--seed") + 1])
        common.write_results(str(directory), {"mean": {"nll": seed, "task": "x"}, "perplexity": 2.0 * seed})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(study.subprocess, "run", fake_run)
    argv = ["study", "run_glue", "--output_dir", str(tmp_path), "--seeds", "1", "2", "9"]
    argv += ["--vary", "--task_name rte", "--setting", "adamw", "--optim adamw_torch", "--", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    study.main()
    study.main()
    assert len(calls) == 3, "finished runs were repeated"
    assert calls[0][-8:] == ["--max_steps", "3", "--task_name", "rte", "--optim", "adamw_torch", "--seed", "1"]
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[-3:] == ["3", "2.0000", "4.0000"]
