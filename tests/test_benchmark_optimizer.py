"""The benchmark of the optimizer runs, and its table says what was measured."""

import json
import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from recipes import benchmark_optimizer


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(benchmark_optimizer.SHAPES, "tiny", lambda: [(30, 8)] * 3)


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
    assert all(row["median_ms"] > 0 for row in rows)
    assert "| tiny | optimizer | ivon plain |" in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def small_gpt2(device):
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).to(device)


def small_minilm(device):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).to(device)


def test_whole_steps_train_each_model(tmp_path, monkeypatch):
    """A step that trains nothing, or the frozen weights of LoRA too, would be the time of something else."""
    monkeypatch.setattr(benchmark_optimizer, "gpt2", small_gpt2)
    monkeypatch.setitem(benchmark_optimizer.WHOLE, "gpt2", small_gpt2)
    monkeypatch.setitem(benchmark_optimizer.WHOLE, "minilm", small_minilm)
    made, moved = benchmark_optimizer.WholeStep, {}

    class Watched(made):
        def run(self):
            before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            seconds = super().run()
            changed = {name for name, p in self.model.named_parameters() if not torch.equal(p, before[name])}
            moved.setdefault(type(self.model).__name__, set()).update(changed)
            return seconds

    monkeypatch.setattr(benchmark_optimizer, "WholeStep", Watched)
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


def test_shapes_are_those_of_the_models():
    """Times per weight would be of another model."""
    shapes = {name: make() for name, make in benchmark_optimizer.SHAPES.items()}
    total = {name: (sum(math.prod(shape) for shape in some), len(some)) for name, some in shapes.items()}
    assert total["gpt2"] == (124_439_808, 148)
    assert total["minilm"] == (22_713_216, 103)
