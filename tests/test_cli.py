"""The `hf-ivon` command: what it prints, as text and as JSON, and how it fails."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import hf_ivon
from hf_ivon.checkpoint import save_posterior
from hf_ivon.cli import merge as merging
from hf_ivon.cli.main import app
from hf_ivon.functional import posterior_variance
from hf_ivon.optim import IVON
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save(directory, hess, *, estimator="ivon-price", hess_init=0.5, ess=4.0):
    """Save a posterior with given Hessians and hess_init 0.5."""
    deltas = {name: 0.0 for name in hess}
    variance = {name: posterior_variance(torch.as_tensor(h), ess=4.0, weight_decay=0.0) for name, h in hess.items()}
    config = PosteriorConfig(
        ess, deltas, hess_init, 1000, None, 12_345, (0.9, 0.999), estimator, "", "gpt2", versions={"torch": "2.0"}
    )
    save_posterior(Posterior(variance, config), directory)
    return directory


@pytest.fixture
def checkpoint(tmp_path):
    """Two layers of 100 weights with h from 0 to 2 h0 in one of them, and a bias of one weight."""
    moved = (torch.arange(100) + 0.5) / 100
    return save(tmp_path, {"net.0.weight": moved, "net.1.weight": torch.full((100,), 0.5), "bias": torch.tensor(2.0)})


def test_text_shows_settings_and_quantiles(checkpoint):
    """Someone who looks into a checkpoint would miss a setting or read a wrong number."""
    result = run("inspect", checkpoint)
    assert result.exit_code == 0, result.output
    _, head, table, *_ = result.stdout.split("\n\n")
    settings_shown, groups = (
        {line.split()[0]: line.split()[1:] for line in part.splitlines()} for part in (head, table)
    )
    settings = {
        "ess": "4",
        "hess_init": "0.5",
        "num_examples": "1,000",
        "steps": "12,345",
        "estimator": "ivon-price",
        "base_model": "gpt2",
        "tensors": "3",
        "parameters": "201",
    }
    for name, value in settings.items():
        assert settings_shown[name] == [value], name
    assert settings_shown["weight_decay"] == ["0", "to", "0,", "by", "tensor"]
    assert settings_shown["versions"] == ["torch", "2.0"]
    assert "num_tokens" not in settings_shown
    assert groups["net.*.weight"][:2] == ["2", "200"]
    # A Hessian of 2 at ess 4 is a σ of 1/√8, and 4 times hess_init.
    assert groups["bias"] == ["1", "1", *["0.354"] * 3, *["4"] * 3, "100.0%"]


def test_json_agrees_with_the_tensors(checkpoint):
    """A script that reads the JSON would get rounded or shifted numbers."""
    result = run("inspect", checkpoint, "--json")
    summary = json.loads(result.stdout)
    ratio = torch.cat([(torch.arange(100) + 0.5) / 50, torch.ones(100), torch.tensor([4.0])]).double()
    sigma = (1 / (4 * 0.5 * ratio)).sqrt()
    for key, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        assert summary["hess_rel"][key] == pytest.approx(ratio.quantile(q).item(), rel=1e-5)
        assert summary["sigma"][key] == pytest.approx(sigma.quantile(q).item(), rel=1e-5)
    assert summary["hess_moved_share"] == pytest.approx(((ratio - 1).abs() > 0.1).double().mean().item())
    assert summary["hess_hardly_moved"] is False
    assert summary["config"]["steps"] == 12_345
    assert summary["directory"] == str(checkpoint)
    assert [group["name"] for group in summary["groups"]] == ["net.*.weight", "bias"]
    assert sum(group["num_parameters"] for group in summary["groups"]) == summary["num_parameters"] == 201


def test_number_of_tensor_groups(checkpoint):
    """A model with hundreds of tensors would fill the screen."""
    assert "bias" not in run("inspect", checkpoint, "--tensors", 1).stdout
    assert "and 1 smaller groups (--tensors 2 lists all)" in run("inspect", checkpoint, "--tensors", 1).stdout
    assert "weight " not in run("inspect", checkpoint, "--tensors", 0).stdout
    assert json.loads(run("inspect", checkpoint, "--json", "--tensors", 0).stdout)["groups"] == []
    assert run("inspect", checkpoint, "--tensors", -1).exit_code == 2


@pytest.mark.parametrize(("num_moved", "hardly"), [(0, True), (4, True), (5, False), (100, False)])
def test_says_when_the_hessian_has_hardly_moved(tmp_path, num_moved, hardly):
    """Widths that are still the initial guess would be taken for knowledge from the data."""
    hess = torch.full((100,), 0.5)
    hess[:num_moved] = 0.8
    hess[num_moved:] *= 1.05
    save(tmp_path, {"weight": hess})
    text = run("inspect", tmp_path).stdout
    assert ("has hardly moved from its start value" in text) is hardly
    assert ("has moved from its start value" in text) is not hardly
    assert json.loads(run("inspect", tmp_path, "--json").stdout)["hess_hardly_moved"] is hardly


def test_other_estimators_have_no_start_value(tmp_path):
    """A Hessian that did not start at `hess_init` would be called unmoved."""
    save(tmp_path, {"weight": torch.full((100,), 0.5)}, estimator="fisher")
    assert "start value" not in run("inspect", tmp_path).stdout
    assert json.loads(run("inspect", tmp_path, "--json").stdout)["hess_hardly_moved"] is None


def test_settings_by_tensor(tmp_path):
    """A posterior of several parameter groups would be measured with the settings of one."""
    save(tmp_path, {"a": torch.tensor([0.5]), "b": torch.tensor([2.0])}, hess_init={"a": 0.5, "b": 2.0})
    result = run("inspect", tmp_path)
    assert "0.5 to 2, by tensor" in result.stdout
    assert "hardly moved" in result.stdout


def test_large_posteriors_are_thinned_out(tmp_path, monkeypatch):
    """Quantiles of a thinned posterior would be off, or the thinning lose small tensors."""
    monkeypatch.setattr("hf_ivon.cli.main._MAX_ELEMENTS", 1000)
    hess = torch.linspace(0.1, 1.1, 50_000)
    save(tmp_path, {"weight": hess, "bias": torch.tensor([0.1])})
    summary = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert summary["hess_rel"]["q50"] == pytest.approx(1.2, rel=0.01)
    assert summary["groups"][1]["hess_rel"]["q50"] == pytest.approx(0.2)


def test_a_trained_model(tmp_path):
    """The command would read its own test data only, and not what training writes."""
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), lr=0.1, ess=10.0, hess_init=0.5)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    Posterior.from_optimizer(optimizer, model, num_examples=4).save_pretrained(tmp_path)
    result = run("inspect", tmp_path)
    assert result.exit_code == 0, result.output
    assert "steps         2\n" in result.stdout
    assert "hardly moved" in result.stdout  # beta2 is 0.99999


def test_figures_of_a_checkpoint(checkpoint, tmp_path):
    """A run's log lies beside its posterior, and would have to be drawn by hand; a broken one must hide nothing."""
    record = {"step": 1, "loss": 2.0}
    record |= {f"ivon_{name}_{q}": 0.5 for name in ("hess_rel", "sigma") for q in ("q01", "q50", "q99")}
    for text, drawn in ((None, False), (json.dumps({"log_history": [record]}), True)):
        if text is not None:
            (checkpoint / "trainer_state.json").write_text(text)
        result = run("inspect", checkpoint, "--plots", tmp_path / str(drawn))
        assert result.exit_code == 0, result.output
        assert {f.name for f in (tmp_path / str(drawn)).iterdir()} == {"sigma.png", *(["training.png"] * drawn)}
    broken = ["[]", "null", "[1]", '[{"step": 1, "loss": null}]', '[{"step": 1, "loss": "high"}]']
    for text, reason in (
        ("{", "trainer_state.json is not readable"),
        *((f'{{"log_history": {history}}}', "must hold records") for history in broken),
    ):
        (checkpoint / "trainer_state.json").write_text(text)
        result = run("inspect", checkpoint, "--plots", tmp_path / "again")
        assert result.exit_code == 0
        assert "No training.png: " in result.output
        assert reason in result.output


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "foreign"])
def test_bad_directories_exit_with_2(tmp_path, checkpoint, damage):
    """A script would go on after a checkpoint that cannot be used, or a person read a traceback."""
    directory = checkpoint
    if damage == "missing":
        directory = tmp_path / "nowhere"
    elif damage == "empty":
        directory = tmp_path / "empty"
        directory.mkdir()
    elif damage == "truncated":
        file = checkpoint / "posterior.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    else:
        (checkpoint / "posterior_config.json").write_text('{"peft_type": "LORA"}')
    for options in ([], ["--json"]):
        result = run("inspect", directory, *options)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"The posterior in {str(directory)!r} cannot be used: ")
        assert "Traceback" not in result.stderr


def test_runs_as_a_module(tmp_path):
    """The command would exist in tests only."""

    def module(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "hf_ivon", *arguments], capture_output=True, text=True, check=False
        )

    assert module("--version").stdout.strip() == hf_ivon.__version__
    assert "inspect" in module("--help").stdout
    failed = module("inspect", str(tmp_path))
    assert failed.returncode == 2
    assert "posterior_config.json is missing" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_lists_end_where_an_option_of_one_value_begins():
    """`--data FILE MODEL` would lose the model to the list that `--data` is in another command."""
    commands = get_command(app).commands
    lists = {name: {p.opts[0] for p in c.params if getattr(p, "multiple", False)} for name, c in commands.items()}
    assert {name: set(options) for name, options in merging._LISTS.items()} == {n: v for n, v in lists.items() if v}
    for command in ("curvature", "evaluate", "sensitivity"):
        line = [command, "--data", "x.jsonl", "MODEL"]
        assert merging.spread(line) == line
        assert merging.spread([*line, "--text-columns", "a", "b"])[4:] == [
            "--text-columns",
            "a",
            "--text-columns",
            "b",
        ]
    assert merging.spread(["merge", "--models=a", "b", "--output-dir=c"]) == ([
        "merge",
        "--models=a",
        "--models",
        "b",
        "--output-dir=c",
    ])
    assert merging.spread([]) == []


def test_where_nothing_can_be_written_is_found_out_first(tmp_path, monkeypatch):
    """Hours of estimating or merging would end in a traceback, and be lost."""
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("load_rows", "load_checkpoint", "load_model"):
        monkeypatch.setattr(f"hf_ivon.data.{name}", lambda *_: pytest.fail("something was loaded"))
    monkeypatch.setattr("hf_ivon.merge.engine.make_plan", lambda *_, **__: pytest.fail("something was planned"))
    data = ["--data", tmp_path / "rows.jsonl"]
    for target in ("file", "file/out", "gone", "gone/out"):
        for line in (
            ["merge", "--models", "a", "--output-dir", tmp_path / target],
            ["curvature", tmp_path, *data, "--output-dir", tmp_path / target],
            ["convert", tmp_path / "hessian", "--output-dir", tmp_path / target],
            ["evaluate", tmp_path, *data, "--output", tmp_path / target / "out.json"],
            ["evaluate", tmp_path, *data, "--plots", tmp_path / target],
            ["sensitivity", tmp_path, *data, "--output", tmp_path / target / "out.jsonl"],
        ):
            result = run(*line)
            assert result.exit_code == 2, result.output
            assert "must be a directory that can be written into, got " in result.output
    result = run("evaluate", tmp_path, *data, "--output", tmp_path)
    assert "`output` must be a file, got the directory" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "gone"]


@pytest.mark.parametrize("command", ["merge", "curvature", "convert", "evaluate", "sensitivity", "inspect"])
def test_a_disk_that_fails_is_one_line(checkpoint, tmp_path, monkeypatch, command):
    """A full disk would show as a traceback, in which nobody finds the reason."""

    def fail(*_, **__):
        raise OSError("No space left on device")

    for name in ("hf_ivon.data.load_rows", "hf_ivon.data.load_model", "hf_ivon.data.load_checkpoint"):
        monkeypatch.setattr(name, fail)
    monkeypatch.setattr("hf_ivon.merge.engine.make_plan", fail)
    monkeypatch.setattr("hf_ivon.plots.sigma_per_layer", fail)
    line = {
        "curvature": [checkpoint, "--data", "x.jsonl", "--output-dir", tmp_path / "out"],
        "merge": ["--models", "a", "--output-dir", tmp_path / "out"],
        "convert": [checkpoint, "--output-dir", tmp_path / "out"],
        "inspect": [checkpoint, "--plots", tmp_path / "out"],
    }
    result = run(command, *line.get(command, [checkpoint, "--data", "x.jsonl"]))
    assert result.exit_code == 2
    assert "error: No space left on device" in result.output
