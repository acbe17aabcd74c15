"""The GPT-2 recipe end to end, on a tiny model."""

import json

import pytest
import torch

from hf_ivon import load_posterior
from recipes import demo, run_clm
from recipes.common import RecipeError

TINY = "n_layer=1,n_embd=16,n_head=2,n_positions=32"


@pytest.fixture
def files(tmp_path):
    for split, num in (("train", 60), ("validation", 20)):
        rows = [{"text": f"{split} sentence number {i} says that {i} and {i} is {2 * i}."} for i in range(num)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "validation.jsonl")]


def run(tmp_path, *flags, name="out"):
    base = {
        "output_dir": tmp_path / name,
        "config_overrides": TINY,
        "block_size": 16,
        "vocab_size": 300,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "eval_num_samples": 2,
    }
    return run_clm.main([*demo.flags(base), *flags])


def test_ivon_run_leaves_a_checkpoint_with_its_posterior(tmp_path, files):
    """The first road of the package: script in, mean and variances out, perplexity at the mean and averaged."""
    results = run(tmp_path, *files, "--learning_rate", "0.5", "--ivon_ess", "1e4")
    assert results["averaged"]["perplexity"] != results["mean"]["perplexity"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["optimizer"] == "ivon"
    model = run_clm.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    posterior = load_posterior(tmp_path / "out", model)
    assert posterior.config.ess == 1e4
    assert not any(name.endswith(".bias") for name in posterior.names()), "frozen biases have a posterior"
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith(".bias"))
    assert run_clm.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == run_clm.END


def test_adamw_is_one_flag_away(tmp_path, files):
    """The baseline must run through the same script, without a posterior."""
    results = run(tmp_path, *files, "--optim", "adamw_torch", "--learning_rate", "1e-3")
    assert "averaged" not in results
    assert not (tmp_path / "out" / "posterior.safetensors").exists()


def test_auto_ess_counts_tokens(tmp_path, files):
    """A language model's loss averages over tokens; counting blocks would widen the posterior about tenfold."""
    run(tmp_path, *files)
    config = load_posterior(tmp_path / "out").config
    assert config.num_tokens == 15 * config.num_examples == config.ess


def test_biases_train_when_asked(tmp_path, files):
    """`--bias true` must not be parsed and ignored."""
    run(tmp_path, *files, "--bias", "true", "--optim", "adamw_torch", "--learning_rate", "1e-2")
    model = run_clm.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.count_nonzero(model.transformer.ln_f.bias) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block_size", "64"], "`block_size` must be at most the model's context of 32, got 64"),
        (["--text_column", "body"], r"lacks the column\(s\) body; it has text"),
        (["--config_overrides", "n_layers=2"], "`config_overrides` must be"),
        (["--optim_args", "h0=1"], "`?optim_args`?.*h0"),
        (["--ivon_hess_init", "-1"], "hess_init` must be a positive number, got -1.0"),
        (["--max_eval_blocks", "0"], "`max_eval_blocks` must be at least 1, got 0"),
        (["--vocab_size", "100"], "`vocab_size` must be at least 257"),
        (["--tokenizer_name", "no/such"], "`tokenizer_name` and `vocab_size` exclude each other"),
        (["--dataset_name", "no/such"], "`dataset_name` and `train_file` exclude each other"),
        (["--streaming", "true"], "`streaming` must come with `dataset_name`"),
        (["--config_name", "no/such"], "`config_name` must be a model on the Hub or its directory"),
    ],
)
def test_bad_input_is_one_error_before_training(tmp_path, files, flags, message):
    """Hours later is too late, and a half-written output directory is in the way."""
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, *files, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "no/such"], "`dataset_name` must be a dataset on the Hub or its directory, got 'no/such'"),
        (["--dataset_name", "any", "--streaming", "true"], "`max_steps` must be given for a streamed dataset"),
        (["--validation_file", "v.txt"], "`validation_file` must come with `train_file`"),
        (["--tokenizer_name", "no/such"], "`tokenizer_name` must be a tokenizer on the Hub or its directory"),
    ],
)
def test_names_that_lead_nowhere_are_one_error(tmp_path, monkeypatch, flags, message):
    """A misspelt name, or a flag that has no effect, would show as a traceback of some library, or not at all."""
    monkeypatch.setattr(run_clm.corpus, "python_documentation", lambda: {"train": ["text"], "validation": ["text"]})
    args = ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu", "true", "--block_size", "16"]
    with pytest.raises(RecipeError, match=message):
        run_clm.main([*args, *flags])


def test_a_local_dataset_can_be_streamed(tmp_path, files):
    """A corpus larger than the disk has no length: tokenizer, blocks and ess must come without one."""
    flags = ["--dataset_name", str(tmp_path), "--streaming", "true", "--learning_rate", "0.5"]
    with pytest.raises(ValueError, match="`?ess`?.*length"):
        run(tmp_path, *flags)
    results = run(tmp_path, *flags, "--ivon_ess", "1e4", name="again")
    assert results["num_eval_tokens"] > 0
    assert load_posterior(tmp_path / "again").config.steps == 3


def test_too_little_text_is_an_error(tmp_path, files):
    """A validation split shorter than one block would evaluate nothing."""
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "short"}))
    with pytest.raises(RecipeError, match="validation text gives no block of 16 tokens"):
        run(tmp_path, *files)


def test_demo_replaces_only_its_own_output(tmp_path):
    """`make demo` twice must work; `--output_dir ~` must not empty a home directory."""
    demo.prepare(tmp_path / "demo")
    (tmp_path / "demo" / "old").touch()
    demo.prepare(tmp_path / "demo")
    assert [f.name for f in (tmp_path / "demo").iterdir()] == [demo.MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(RecipeError, match="of an earlier demo"):
        demo.prepare(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_demo_shows_both_optimizers(tmp_path, monkeypatch, capfd):
    """The first thing a visitor runs: table, curves, and what the checkpoint holds."""
    tiny = {"config_overrides": TINY, "block_size": 16, "vocab_size": 300, "eval_steps": 1, "max_eval_blocks": 4}
    monkeypatch.setattr(demo, "SHARED", {**demo.SHARED, **tiny})
    documents = {"train": ["some words to learn from. " * 200], "validation": ["other words to learn. " * 50]}
    monkeypatch.setattr(run_clm.corpus, "python_documentation", lambda: documents)
    monkeypatch.setattr("sys.argv", ["demo", "--output_dir", str(tmp_path / "demo"), "--max_steps", "2"])
    demo.main()
    output = capfd.readouterr().out
    for expected in ("AdamW", "IVON at the mean", "16 weight samples", "estimator", "Curves"):
        assert expected in output
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 5000
    assert load_posterior(tmp_path / "demo" / "ivon").config.steps == 2
