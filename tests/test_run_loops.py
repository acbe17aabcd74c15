"""The recipes that go through Accelerate and TRL, on tiny models: end to end, resumed, and in two processes."""

import json
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from hf_ivon import load_posterior
from hf_ivon.hub import write_card
from recipes import common, demo, glue_tasks, run_glue_no_trainer
from tests import processes, tiny
from tests.test_run_glue import model_dir, write_rows

__all__ = ["model_dir"]

ROOT = Path(__file__).parent.parent


def loop_flags(tmp_path, model_dir, name="out", **more):
    base = {
        "task_name": "mrpc",
        "model_name_or_path": model_dir,
        "output_dir": tmp_path / name,
        "ess": 1e4,
        "hess_init": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "mc_samples": 2,
        "num_train_epochs": 2,
        "use_cpu": "true",
        "eval_num_samples": 2,
    }
    return demo.flags({**base, **more})


def test_loop_leaves_model_posterior_and_results(tmp_path, model_dir):
    """A custom loop must end with the same files as the Trainer: a mean that loads, and its posterior."""
    files = write_rows(tmp_path, glue_tasks.TASKS["mrpc"])
    results = run_glue_no_trainer.main([*loop_flags(tmp_path, model_dir), *files])
    assert set(results["mean"]) == set(results["averaged"]) >= {"f1", "nll", "ece"}
    assert results["max_steps"] == 6
    model = run_glue_no_trainer.run_glue.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    config = load_posterior(tmp_path / "out", model).config
    assert (config.ess, config.num_examples, config.steps) == (1e4, 24, 6)


def test_loop_resumes_bit_for_bit(tmp_path, model_dir):
    """A loop's saved state would lose the step count, the data order or the noise."""
    files = write_rows(tmp_path, glue_tasks.TASKS["mrpc"])
    run_glue_no_trainer.main([*loop_flags(tmp_path, model_dir, "straight", checkpointing_steps=4), *files])
    state = tmp_path / "straight" / "step-4"
    run_glue_no_trainer.main([
        *loop_flags(tmp_path, model_dir, "resumed", resume_from_checkpoint=state, seed=42),
        *files,
    ])
    for file in ("model.safetensors", "posterior.safetensors"):
        straight, resumed = (load_file(tmp_path / run / file) for run in ("straight", "resumed"))
        assert all((straight[k] == resumed[k]).all() for k in straight)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("checkpointing_steps", -1, 0), ("gradient_accumulation_steps", 0, 1), ("mc_samples", 0, 1)],
)
def test_loop_refuses_numbers_that_it_cannot_use(tmp_path, model_dir, name, value, least):
    """A state would be saved after every step, the mean be trained without a sample, or a division end the run."""
    with pytest.raises(
        common.RecipeError, match=f"`{name}` must be at least {least}, got {value}. Leave out --{name}"
    ):
        run_glue_no_trainer.main(loop_flags(tmp_path, model_dir, **{name: value}))


@pytest.mark.slow
def test_loop_runs_in_two_processes(tmp_path, model_dir):
    """Started by a launcher, the loop must shard the data, average the curvature and write once."""
    files = write_rows(tmp_path, glue_tasks.TASKS["mrpc"])
    script = ROOT / "recipes" / "run_glue_no_trainer.py"
    done = processes.launch(tmp_path, 2, "run", str(script), *loop_flags(tmp_path, model_dir), *files)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mrpc, ivon") == 1
    assert load_posterior(tmp_path / "out").config.steps == 4  # 24 examples, 2 x 4 x 2 in a step: 2 an epoch


@pytest.fixture
def auto_disabled_after():
    yield
    import hf_ivon.auto

    hf_ivon.auto.disable()


def test_lora_recipe_saves_a_posterior_over_the_adapter(tmp_path, auto_disabled_after):
    """The file beside the adapter must name the adapter's tensors, and load with PEFT's model."""
    import hf_ivon.auto

    hf_ivon.auto.enable()
    from recipes import run_sft_lora

    sentences = [f"The number {i} is smaller than the number {i + 1}." for i in range(24)]
    tiny.save_gpt2(tmp_path / "gpt2", sentences, 64)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in sentences))
    flags = {
        "model_name_or_path": tmp_path / "gpt2",
        "train_file": tmp_path / "rows.jsonl",
        "validation_file": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "lora_target_modules": "c_attn",
        "max_steps": 3,
        "eval_num_samples": 2,
        "report_to": "none",
        "use_cpu": "true",
        "max_length": 32,
    }
    settings = str(ROOT / "recipes" / "settings" / "ivon_lora.json")
    results = run_sft_lora.main([settings, *demo.flags(flags)])
    assert results["averaged"]["perplexity"] != results["mean"]["perplexity"]
    assert "averaged over 2 weight samples" in write_card(tmp_path / "out").read_text(), "results are not in the card"
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    posterior = load_posterior(tmp_path / "out", peft.PeftModel.from_pretrained(base, tmp_path / "out"))
    assert set(posterior.names()) == set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert (posterior.config.ess, posterior.config.steps) == (1e7, 3)
    with pytest.raises(common.RecipeError, match=r"must have text or prompt and completion or messages"):
        (tmp_path / "other.jsonl").write_text(json.dumps({"body": "x"}))
        run_sft_lora.main([
            settings,
            *demo.flags({**flags, "train_file": tmp_path / "other.jsonl", "output_dir": "n"}),
        ])
