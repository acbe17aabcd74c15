"""The benchmark of the optimizer runs, and its table says what was measured."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from recipes import benchmark_optimizer, timing


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(timing.SHAPES, "tiny", lambda: [(30, 8)] * 3)


@pytest.mark.parametrize("contexts", [1, 2])
def test_every_optimizer_gets_a_row_with_its_ratio_to_adamw(small, tmp_path, capsys, contexts):
    """A table that lacks an optimizer, or compares different rounds, would settle a question wrongly."""
    arguments = ["--models", "tiny", "--rounds", "3", "--contexts", str(contexts), "--device", "cpu", "--optimizers"]
    names = ["adamw fused", "ivon foreach", "ivon plain"]
    benchmark_optimizer.main(["--output_dir", str(tmp_path), *arguments, *names])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    by_name = {row["optimizer"]: row for row in rows}
    assert set(names) < set(by_name)
    assert by_name["adamw fused"]["to_fused_adamw"] == 1.0
    assert all(math.isfinite(row["median_ms"]) for row in rows)
    assert "| tiny | optimizer | ivon plain |" in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def small_gpt2(device):
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).to(device)


def small_minilm(device):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).to(device)


def test_whole_steps_train_each_model(tmp_path, monkeypatch):
    """A step that trains nothing, or the frozen weights of LoRA too, would be the time of something else."""
    monkeypatch.setattr(timing, "gpt2", small_gpt2)
    monkeypatch.setitem(timing.WHOLE, "gpt2", small_gpt2)
    monkeypatch.setitem(timing.WHOLE, "minilm", small_minilm)
    made, moved = timing.WholeStep, {}

    class Watched(made):
        def run(self):
            before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            seconds = super().run()
            changed = {name for name, p in self.model.named_parameters() if not torch.equal(p, before[name])}
            moved.setdefault(type(self.model).__name__, set()).update(changed)
            return seconds

    monkeypatch.setattr(timing, "WholeStep", Watched)
    flags = ["--output_dir", str(tmp_path), "--models", "gpt2", "minilm", "lora", "--whole_step", "--rounds", "1"]
    flags += [
        "--batch_size",
        "2",
        "--block_size",
        "8",
        "--device",
        "cpu",
        "--optimizers",
        "adamw fused",
        "ivon foreach",
    ]
    benchmark_optimizer.main(flags)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["gpt2"] * 2 + ["minilm"] * 2 + ["lora"] * 2
    assert "transformer.wte.weight" in moved["GPT2LMHeadModel"]
    assert "classifier.weight" in moved["BertForSequenceClassification"]
    assert moved["PeftModel"]
    assert all("lora_" in name for name in moved["PeftModel"])
    with pytest.raises(SystemExit):
        benchmark_optimizer.main(["--output_dir", str(tmp_path), "--models", "tiny", "--whole_step"])


def test_kernels_are_those_of_the_device_without_the_names_of_ranges(monkeypatch):
    """What the host does, or a range that contains kernels, would count as one more kernel and its time again."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    found = [(cuda, 30.0, False), (cuda, 20.0, False), (cuda, 70.0, True), (cpu, 500.0, False)]

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

        def events(self):
            for device_type, took, is_annotation in found:
                time_range = SimpleNamespace(elapsed_us=lambda took=took: took)
                yield SimpleNamespace(device_type=device_type, is_user_annotation=is_annotation, time_range=time_range)

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []
    assert benchmark_optimizer.traced(lambda: ran.append(1)) == (2, pytest.approx(5e-5))
    assert ran == [1]


def test_work_of_the_device_leaves_the_backward_pass_out(small, monkeypatch):
    """Gradients that are handed out for the measurement would count as the optimizer's launches."""
    backward_passes = []

    def traced(work):
        backward_passes.clear()
        work()
        return 100 * (not backward_passes) + 7 * len(backward_passes), float(len(backward_passes))

    options = SimpleNamespace(whole_step=False, device="cpu", contexts=2)
    make = timing.optimizers(["ivon foreach"])["ivon foreach"]
    step = timing.make_step("tiny", make, options, with_twins=True)
    backward = step.backward
    monkeypatch.setattr(step, "backward", lambda params: (backward_passes.append(1), backward(params)))
    monkeypatch.setattr(benchmark_optimizer, "traced", traced)
    assert benchmark_optimizer.device_work(step) == (0, 0.0), "four of a step, and four by themselves"
    monkeypatch.setattr(step, "twins", None)
    assert benchmark_optimizer.device_work(step) == (0, 0.0), "two, and two"


def test_the_table_shows_what_was_measured_on_a_gpu_only_where_it_was():
    """Columns of dashes would be most of a CPU's table."""
    row = {"model": "gpt2", "what": "optimizer", "optimizer": "ivon fused", "median_ms": 1.5, "kernels": None}
    floor = {key: row[key] for key in ("model", "what", "optimizer", "median_ms")}
    assert "kernels" not in benchmark_optimizer.table([row, floor])
    lines = benchmark_optimizer.table([{**row, "kernels": 6, "device_ms": 1.25}, floor]).splitlines()
    assert lines[0].endswith("| kernels | ms of the GPU |")
    assert lines[2].endswith("| 6 | 1.25 |")
    assert {line.count("|") for line in lines} == {7}


def test_shapes_are_those_of_the_models():
    """Times per weight would be of another model."""
    shapes = {name: make() for name, make in timing.SHAPES.items()}
    total = {name: (sum(math.prod(shape) for shape in some), len(some)) for name, some in shapes.items()}
    assert total["gpt2"] == (124_439_808, 148)
    assert total["minilm"] == (22_713_216, 103)
