"""The curvature recipe end to end on a tiny BERT, and its rank correlation against SciPy's."""

import json

import pytest
import torch
from scipy.stats import spearmanr

from recipes import curvature_study, demo
from recipes.common import RecipeError
from recipes.glue_tasks import TASKS
from tests.test_run_glue import make_model, write_rows


def flags(tmp_path, *more):
    files = write_rows(tmp_path, TASKS["sst2"])
    base = ["--task_name", "sst2", "--model_name_or_path", make_model(tmp_path), "--output_dir", tmp_path / "out"]
    run = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--report_to", "none"]
    own = ["--examples", "8", "--samples", "2", "--"]
    return [*own, *map(str, [*base, *files, *run, "--use_cpu", "true", "--disable_tqdm", "true", *more])]


def test_both_tables(tmp_path, capsys):
    """The measure of what a posterior knows would not run, or would train again what is finished."""
    arguments = flags(tmp_path, "--ivon_hess_approx", "fisher", "--ivon_beta2", "0.9")
    results = curvature_study.main(arguments)
    printed = capsys.readouterr().out
    assert {"bert.encoder.layer.0", "classifier", "overall"} <= set(results["layers"])
    weights, seen, correlation, *_, moved = results["layers"]["overall"]
    assert weights > 1000
    assert 0 < seen <= 1
    assert -1 <= correlation <= 1
    assert moved > 0.9  # h0 is 1, and the estimates of such a model are thousandths
    assert set(results["quality"]) == {"mean", "2 samples"}
    assert "rank corr." in printed
    assert json.loads((tmp_path / "out" / "curvature.json").read_text())["layers"].keys() == results["layers"].keys()
    stamp = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    assert curvature_study.main(arguments)["layers"]["overall"] == results["layers"]["overall"]
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == stamp


def test_a_language_model_from_scratch(tmp_path, capsys):
    """What a GPT-2 has learnt of its curvature could not be told."""
    texts = "\n".join(json.dumps({"text": f"Sentence {i} says that {i} and {i} is {2 * i}."}) for i in range(60))
    (tmp_path / "text.jsonl").write_text(texts)
    settings = {
        "train_file": tmp_path / "text.jsonl",
        "output_dir": tmp_path / "out",
        "config_overrides": "n_layer=1,n_embd=16,n_head=2,n_positions=32",
        "block_size": 16,
        "vocab_size": 300,
        "max_steps": 6,
        "ivon_hess_approx": "fisher",
        "ivon_ess": "1e5",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    own = ["--recipe", "run_clm", "--examples", "8", "--samples", "2", "--"]
    results = curvature_study.main([*own, *demo.flags(settings)])
    assert {"transformer.h.0", "overall"} <= set(results["layers"])
    assert results["layers"]["overall"][2] is not None
    assert results["quality"]["mean"]["perplexity"] != results["quality"]["2 samples"]["perplexity"]
    assert "perplexity" in capsys.readouterr().out


def test_a_run_without_posterior_is_named(tmp_path):
    """AdamW's run would end in a traceback."""
    with pytest.raises(RecipeError, match="must hold a posterior"):
        curvature_study.main(flags(tmp_path, "--optim", "adamw_torch"))


def test_rank_correlation_is_scipys():
    """Ties, which zero curvatures are, must share their rank."""
    a, b = torch.randn(200), torch.randn(200)
    a[:50] = 0.0
    assert curvature_study.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert curvature_study.rank_correlation(a, torch.ones(200)) is None
