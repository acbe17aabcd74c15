"""The pretraining race gives all optimizers the same steps, and counts the time of training alone."""

import json
from types import SimpleNamespace

import pytest

from recipes import pretraining_race, run_clm
from recipes.common import RecipeError

TINY = ["--config_overrides", "n_layer=1,n_embd=16,n_head=1,n_positions=32", "--block_size", "16"]
TINY += ["--vocab_size", "300", "--per_device_train_batch_size", "2", "--use_cpu", "true", "--max_eval_blocks", "4"]


def test_all_settings_run_the_same_steps_to_the_end_of_their_schedule(tmp_path, capsys):
    """Whoever trained longer, or broke off before its learning rate was down, would lose or win by that."""
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"row {i} of a text about nothing"}) for i in range(100)))
    ivon = ["--setting", "IVON, wide", "--optim ivon --learning_rate 0.5 --ivon_ess 1e4"]
    settings = ["--setting", "AdamW", "--optim adamw_torch --learning_rate 1e-3", *ivon]
    flags = ["--output_dir", str(tmp_path / "race"), "--minutes", "0.001", *settings, "--"]
    results = pretraining_race.main([*flags, *TINY, "--train_file", str(file)])
    assert results["steps"] >= 20
    assert list(results["seconds"]) == ["AdamW", "IVON, wide"]
    for name, run in results["runs"].items():
        rates = [record["learning_rate"] for record in run["history"] if "learning_rate" in record]
        assert run["max_steps"] == results["steps"]
        assert rates[-1] < 0.05 * max(rates)
        seconds = [record["train_seconds"] for record in run["history"]]
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < seconds[-1] == results["seconds"][name]
        points = pretraining_race.curve(run["history"], "step")
        assert points[-1][0] == results["steps"]
        assert len(points) >= 20
    assert "IVON, wide" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "race").iterdir()}
    assert written == {"results.json", "loss_by_step.png", "loss_by_time.png", "adamw", "ivon,-wide"}


def test_evaluations_do_not_count(monkeypatch):
    """An optimizer would look slow by how often it was looked at; a resumed run must not begin at 0."""
    times = iter([100.0, 103.0, 108.0, 110.0, 500.0, 501.0])
    monkeypatch.setattr(run_clm.time, "perf_counter", lambda: next(times))
    clock, history = run_clm.Clock(), []
    state = SimpleNamespace(log_history=history)
    clock.on_train_begin(None, state, None)
    for record in ({"loss": 1.0}, {"eval_loss": 1.0, "eval_runtime": 4.0}, {"loss": 0.5}):
        history.append(record)
        clock.on_log(None, state, None)
    assert [record["train_seconds"] for record in history] == [3.0, 4.0, 6.0]
    resumed = run_clm.Clock()
    resumed.on_train_begin(None, state, None)
    history.append({"loss": 0.4})
    resumed.on_log(None, state, None)
    assert history[-1]["train_seconds"] == 7.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--minutes", "0"], "`minutes` must be positive, got 0.0"), ([], "`output_dir` must be empty or new")],
)
def test_bad_input_is_one_error_before_training(tmp_path, flags, message):
    """An earlier race would be mixed with this one."""
    (tmp_path / "results.json").touch()
    with pytest.raises(RecipeError, match=message):
        pretraining_race.main(["--output_dir", str(tmp_path), *flags])
