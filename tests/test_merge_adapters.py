"""Merging LoRA adapters: products of different ranks, and what must agree."""

import json

import peft
import pytest
import torch

from hf_ivon.merge import merge
from tests import tiny
from tests.test_merge import save

BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def adapter(directory, name, seed, base=tiny.bert, **config):
    """Save a random adapter and return the base model with it folded in by PEFT."""
    generator = torch.Generator().manual_seed(seed)
    base().save_pretrained(directory / "base")
    model = base()
    model.name_or_path = str(directory / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    save(model, directory / name, 100, generator)
    return dict(model.merge_and_unload().named_parameters())


def with_peft(directory, base=tiny.bert):
    return dict(peft.PeftModel.from_pretrained(base(), directory).merge_and_unload().named_parameters())


KINDS = {
    "ranks": ({"r": 2, **BERT}, {"r": 5, **BERT}, tiny.bert),
    "targets": ({"r": 2, **BERT}, {"r": 2, **BERT, "target_modules": ["query", "key"]}, tiny.bert),
    "patterns": (
        {"r": 2, "lora_alpha": 3, "rank_pattern": {"query": 4}, "alpha_pattern": {"value": 7}, **BERT},
        {"r": 3, "use_rslora": True, **BERT},
        tiny.bert,
    ),
    "transposed": (
        {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        tiny.gpt2,
    ),
    "embeddings": (
        {"r": 2, "target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"},
        {"r": 3, "target_modules": ["word_embeddings"], "task_type": "SEQ_CLS"},
        tiny.bert,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_concatenation_is_the_sum_of_the_products(tmp_path, kind):
    """Adapters of different ranks have no common A and B; the sum of their products must still be exact in PEFT."""
    first, second, base = KINDS[kind]
    one, two = adapter(tmp_path, "a", 1, base, **first), adapter(tmp_path, "b", 2, base, **second)
    names = [str(tmp_path / n) for n in "ab"]
    merge(names, tmp_path / "out", method="task-arithmetic", weights=[0.5, 2.0], adapters="concat")
    found, start = with_peft(tmp_path / "out", base), dict(base().named_parameters())
    assert found.keys() == start.keys()
    for name, p in start.items():
        if not name.startswith("classifier"):
            expected = p + 0.5 * (one[name] - p) + 2.0 * (two[name] - p)
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
        else:  # a head is a whole tensor: the weighted average
            torch.testing.assert_close(found[name], (0.5 * one[name] + 2.0 * two[name]) / 2.5)


def test_svd_keeps_the_largest_rank(tmp_path):
    """The best approximation of the sum at that rank, by Eckart and Young: no other is nearer."""
    first, second, base = KINDS["ranks"]
    one, two = adapter(tmp_path, "a", 1, base, **first), adapter(tmp_path, "b", 2, base, **second)
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average", adapters="svd")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 5
    found = with_peft(tmp_path / "out")
    for name, p in base().named_parameters():
        if "query" in name and "weight" in name:
            u, s, v = torch.linalg.svd(((one[name] - p) + (two[name] - p)) / 2)
            torch.testing.assert_close(found[name] - p, u[:, :5] * s[:5] @ v[:5], rtol=1e-3, atol=1e-3)


def test_what_must_agree_is_named(tmp_path):
    """A with A and B with B is only right for one rank and one scale; with others it would be silently wrong."""
    adapter(tmp_path, "a", 1, r=2, lora_alpha=8, **BERT)
    adapter(tmp_path, "b", 2, r=2, lora_alpha=16, **BERT)
    names = [str(tmp_path / n) for n in "ab"]
    with pytest.raises(ValueError, match=r"differ in `lora_alpha` \(8 in .*a, 16 in .*b\): pass --adapters concat"):
        merge(names, tmp_path / "out", method="average")
    with pytest.raises(ValueError, match="uncertainty of adapters needs the adapter that all of them started from"):
        merge(names[:1] * 2, tmp_path / "out", base_model=tmp_path / "base")
    with pytest.raises(ValueError, match="products of adapters have no posterior for gaussian"):
        merge(names, tmp_path / "out", method="gaussian", adapters="concat")
    with pytest.raises(ValueError, match="`adapters` must be one of concat, svd, got 'cat'"):
        merge(names, tmp_path / "out", method="average", adapters="cat")
    with pytest.raises(ValueError, match="base is no adapter"):
        merge([*names, str(tmp_path / "base")], tmp_path / "out", method="average")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other"}))
    with pytest.raises(ValueError, match="adapters are of different base models"):
        merge(names, tmp_path / "out", method="average", adapters="concat")
    assert not (tmp_path / "out").exists()
