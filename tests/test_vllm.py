"""vLLM serves what a merge writes. It pins other versions of torch and Transformers: `make test-vllm`."""

import json
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ivon.merge import merge
from tests.test_merge import save

PROMPTS = [[5, 3, 8, 2], [9, 9, 1], [4]]
NEW = 8


@pytest.fixture
def served(request, tmp_path):
    """Return what vLLM continues the prompts with, given a model and perhaps an adapter."""
    python = request.config.getoption("--vllm-python")
    if python is None:
        pytest.skip("needs an environment with vLLM: make test-vllm")

    def run(*paths):
        model, *adapter = (str(p) for p in paths)
        script = str(Path(__file__).with_name("vllm_generate.py"))
        command = [python, script, model, json.dumps(PROMPTS), str(NEW), *adapter]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(
            next(line for line in done.stdout.splitlines() if line.startswith("[["))
        )  # beside vLLM's log

    return run


def llama(seed):
    """A small Llama; with heads of 64, which vLLM's attention on a CPU wants."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))


def greedy(model):
    """What Transformers continues the prompts with."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    found = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **settings) for p in PROMPTS]
    return [f[0, len(p) :].tolist() for p, f in zip(PROMPTS, found, strict=True)]


def test_vllm_serves_a_merged_model(tmp_path, served):
    """The files of a merge must be a plain model to vLLM too: the same tokens as with Transformers."""
    llama(0).save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        save(llama(seed), tmp_path / f"model-{seed}", 100, torch.Generator().manual_seed(seed))
    merge([str(tmp_path / f"model-{s}") for s in (1, 2)], tmp_path / "merged", base_model=tmp_path / "base")
    expected = greedy(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    assert expected != greedy(llama(0))
    assert served(tmp_path / "merged") == expected


def test_vllm_serves_a_merged_adapter(tmp_path, served):
    """Also one of adapters of different ranks, which the merge concatenates."""
    llama(0).save_pretrained(tmp_path / "base")
    for rank in (2, 4):
        model = llama(0)
        model.name_or_path = str(tmp_path / "base")
        targets = ["q_proj", "v_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        save(model, tmp_path / f"rank-{rank}", 100, generator)
    merge(
        [str(tmp_path / f"rank-{r}") for r in (2, 4)], tmp_path / "merged", method="task-arithmetic", adapters="concat"
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    expected = greedy(peft.PeftModel.from_pretrained(base, tmp_path / "merged").merge_and_unload())
    assert expected != greedy(llama(0))
    assert served(tmp_path / "base", tmp_path / "merged") == expected
