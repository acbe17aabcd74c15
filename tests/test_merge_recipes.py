"""The recipes about merging, end to end on tiny models."""

import gzip
import json

import pytest

from recipes import benchmark_merge, merge_sentiment
from recipes.common import RecipeError
from tests.test_run_glue import WORDS, model_dir

__all__ = ["model_dir"]


@pytest.fixture
def data(tmp_path):
    """Files as of the five tasks, in their columns; one test sentence is also trained on."""
    for number, task in enumerate(merge_sentiment.TASKS):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = []
            for i in range(12):
                words = [task[:4], split, WORDS[i % len(WORDS)], str(i), str(number)]
                if task == "rotten_tomatoes" and split == "test" and i == 0:
                    words = ["SST2,", "train", WORDS[0], "0", "4."]  # the spelling of another task's training sentence
                text = " ".join(words)
                row = (
                    {"title": words[0], "content": " ".join(words[1:])}
                    if task.startswith("amazon")
                    else {"text": text}
                )
                rows.append({**row, "label": i % 2})
            if task != "imdb" or split != "validation":
                with gzip.open(tmp_path / "data" / task / f"{split}.jsonl.gz", "wt") as file:
                    file.write("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def test_merging_study_end_to_end(tmp_path, data, model_dir, capsys):
    """Five models are trained, merged by every rule in both set-ups and evaluated; a second run repeats nothing."""
    flags = ["--data_dir", str(data), "--model_name_or_path", str(model_dir), "--output_dir", str(tmp_path / "out")]
    flags += ["--seeds", "0", "--max_eval_samples", "8", "--curvature_samples", "4", "--max_length", "16", "--"]
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true"]
    merge_sentiment.main([*flags, "--save_strategy", "no", "--disable_tqdm", "true"])
    first = capsys.readouterr().out
    for row in (
        "single: imdb",
        "base: imdb",
        "task arithmetic",
        "TIES",
        "SG, tuned",
        "IVON, weights 1",
        "IVON, no prior",
    ):
        assert row in first
    kept = [
        json.loads(line)["sentence"] for line in (tmp_path / "out" / "data" / "rotten_tomatoes" / "test.jsonl").open()
    ]
    assert not any(sentence.startswith("SST2") for sentence in kept), "a test sentence was trained on"
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}
    merge_sentiment.main(flags)
    assert capsys.readouterr().out == first
    assert stamps == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.safetensors")}


def test_benchmark_measures_every_command(tmp_path, monkeypatch, capsys):
    """Each command must really run, on files of the size that the throughput is computed from."""
    for name, value in (("WIDTH", 8), ("INNER", 16), ("VOCABULARY", 32)):
        monkeypatch.setattr(benchmark_merge, name, value)
    flags = ["--work_dir", str(tmp_path), "--layers", "1", "--num_models", "2", "--rounds", "1", "--posteriors"]
    benchmark_merge.main(flags)
    rows = {row[0]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    copies = ["cp", "cp, synced", "cp with posteriors", "cp with posteriors, synced"]
    assert list(rows) == [*copies[:2], "average", "task-arithmetic", *copies[2:], "uncertainty"]
    assert all(seconds > 0 and memory > 1 for _, seconds, *_, memory in rows.values())
    assert rows["cp"][-1] < rows["average"][-1], "the memory is that of another process"
    for i, name in enumerate(copies):
        assert rows[name][5 if i % 2 else 4] == 1, "a copy is compared with another one"
    time_of = {name: row[1] for name, row in rows.items()}
    # two models are copied or read, and one is written: copying moves four, averaging three
    assert rows["average"][3] == pytest.approx(3 / 4 * time_of["cp"] / time_of["average"])
    assert rows["average"][4] == pytest.approx(time_of["cp"] / time_of["average"])
    assert rows["average"][5] == pytest.approx(time_of["cp, synced"] / time_of["average"])
    read = sum(f.stat().st_size for f in tmp_path.glob("model-*/*.safetensors"))
    more = (tmp_path / "base" / "model.safetensors").stat().st_size  # which is not copied
    with_base = (read + more) / read
    synced = time_of["cp with posteriors, synced"] / time_of["uncertainty"]
    assert rows["uncertainty"][5] == pytest.approx(with_base * synced)
    assert "peak MiB" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="The command failed: false"):
        benchmark_merge.run(["false"])


def test_the_benchmark_begins_again_where_it_was_stopped(tmp_path, monkeypatch):
    """A model that was half written ended every later run; a space in a path was the end of a name."""
    for name, value in (("WIDTH", 8), ("INNER", 16), ("VOCABULARY", 32)):
        monkeypatch.setattr(benchmark_merge, name, value)
    work = tmp_path / "my work; false"
    (work / "base").mkdir(parents=True)
    (work / "base" / "model.safetensors").write_bytes(b"half of a model")
    benchmark_merge.main(["--work_dir", str(work), "--layers", "1", "--num_models", "2", "--rounds", "1"])
    rows = {row[0]: row for row in json.loads((work / "results.json").read_text())["rows"]}
    assert rows["cp"][1] > 0
    assert rows["cp, synced"][1] > 0


def test_merging_study_needs_rows_to_tune_with(tmp_path, capsys):
    """With one row none was left for tuning, and the study ended in a traceback after it had trained."""
    flags = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--max_eval_samples", "1"]
    with pytest.raises(SystemExit):
        merge_sentiment.main(flags)
    assert "--max_eval_samples: must be at least 2, got 1" in capsys.readouterr().err
