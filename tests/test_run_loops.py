"""The recipes that go through Accelerate and TRL, on tiny models: end to end, resumed, and in two processes."""

import json
import os
import sys
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_ivon import load_posterior
from recipes import common, demo, glue_tasks, run_glue_no_trainer
from tests import processes
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


@pytest.mark.slow
def test_loop_runs_in_two_processes(tmp_path, model_dir):
    """Started by a launcher, the loop must shard the data, average the curvature and write once."""
    files = write_rows(tmp_path, glue_tasks.TASKS["mrpc"])
    script = ROOT / "recipes" / "run_glue_no_trainer.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)]
    done = processes.command([*command, *loop_flags(tmp_path, model_dir), *files], tmp_path, environment)
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
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences, vocab_size=300, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
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
    assert results["perplexity_averaged"] != results["perplexity_mean"]
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
