"""The benchmark of the optimizer runs, and its table says what was measured."""

import json
import math

import pytest

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


def test_shapes_are_those_of_the_models():
    """Times per weight would be of another model."""
    shapes = {name: make() for name, make in benchmark_optimizer.SHAPES.items()}
    total = {name: (sum(math.prod(shape) for shape in some), len(some)) for name, some in shapes.items()}
    assert total["gpt2"] == (124_439_808, 148)
    assert total["minilm"] == (22_713_216, 103)
