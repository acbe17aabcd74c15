"""Merging LoRA adapters: products of different ranks, and what must agree."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification

from hf_ivon.merge import merge
from tests import tiny
from tests.test_merge import save

BERT = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


def adapter(directory, name, seed, base=tiny.bert, kind=peft.LoraConfig, prepare=None, **config):
    """Save a random adapter and return the base model with it folded in by PEFT."""
    generator = torch.Generator().manual_seed(seed)
    base().save_pretrained(directory / "base")
    model = base()
    model.name_or_path = str(directory / "base")
    if prepare is not None:
        prepare(model)
    model = peft.get_peft_model(model, kind(**config))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    save(model, directory / name, 100, generator)
    return dict(model.merge_and_unload().named_parameters())


def resnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def with_peft(directory, base=tiny.bert):
    return dict(peft.PeftModel.from_pretrained(base(), directory).merge_and_unload().named_parameters())


def config_of(directory, **changes):
    """Return an adapter's configuration, after changing it."""
    config = json.loads((directory / "adapter_config.json").read_text()) | changes
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return config


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
    config_of(tmp_path / "b", base_model_name_or_path="other")
    with pytest.raises(ValueError, match="adapters are of different base models"):
        merge(names, tmp_path / "out", method="average", adapters="concat")
    assert not (tmp_path / "out").exists()


VARIANTS = {
    "dora": ({"use_dora": True}, "has `use_dora`, and only plain LoRA can be"),
    "bias of B": ({"lora_bias": True}, "has `lora_bias`, and only plain LoRA can be"),
    "biases": ({"bias": "all"}, "trains biases, which products leave out"),
    "biases of layers": ({"bias": "lora_only"}, "trains biases, which products leave out"),
    "pissa": ({"init_lora_weights": "pissa"}, "started with 'pissa', .* `path_initial_model_for_weight_conversion`"),
}


@pytest.mark.parametrize("option", [{"adapters": "concat"}, {"adapters": "svd"}, {"into_base": True}])
@pytest.mark.parametrize("kind", VARIANTS)
def test_only_plain_lora_is_its_products(tmp_path, kind, option):
    """Magnitudes, biases, or a base that was changed with A and B, would be left out without a word."""
    config, message = VARIANTS[kind]
    adapter(tmp_path, "a", 1, r=2, **config, **BERT)
    names = [str(tmp_path / "a")]
    with pytest.raises(ValueError, match=message):
        merge(names, tmp_path / "out", method="average", **option)
    assert not (tmp_path / "out").exists()
    merge(names, tmp_path / "adapter", method="average")  # A with A and B with B is right for them


def test_other_adapters_are_not_folded(tmp_path):
    """IA3 has no products: the base was written unchanged, with its vectors beside."""
    target = {"target_modules": ["query", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]}
    adapter(tmp_path, "a", 1, kind=peft.IA3Config, task_type="SEQ_CLS", **target)
    with pytest.raises(ValueError, match="a is IA3, and only LoRA can be folded: merge without --into-base"):
        merge([str(tmp_path / "a")], tmp_path / "out", method="average", into_base=True)
    with pytest.raises(ValueError, match="a is IA3, and only LoRA can be merged as products: merge without --adapt"):
        merge([str(tmp_path / "a")], tmp_path / "out", method="average", adapters="concat")


def test_one_start_for_all(tmp_path):
    """A and B of PiSSA belong to what it left of the base; beside those of plain LoRA they mean something else."""
    adapter(tmp_path, "a", 1, r=2, init_lora_weights="pissa", **BERT)
    adapter(tmp_path, "b", 2, r=2, **BERT)
    with pytest.raises(ValueError, match="differ in `trainable_token_indices`, or in a start that changes the base's"):
        merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average")


@pytest.mark.parametrize("labels", [None, 2])
def test_heads_that_differ_are_settled(tmp_path, labels):
    """A head that one adapter lacks, or has for other labels, cannot be averaged: it crashed, or was 0/0."""
    if labels is None:
        adapter(tmp_path, "a", 1, r=2, target_modules=["query"])
    else:
        adapter(tmp_path, "a", 1, lambda: tiny.bert(num_labels=labels), r=2, **BERT)
    two = adapter(tmp_path, "b", 2, r=3, **BERT)
    names, options = [str(tmp_path / n) for n in "ab"], {"method": "average", "adapters": "concat", "weights": [1, 0]}
    with pytest.raises(ValueError, match=r"2 tensors .* `base_model.model.classifier.bias`.*, or --heads keep:MODEL"):
        merge(names, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="heads of adapters cannot be kept apart: .* fold each adapter into its base"):
        merge(names, tmp_path / "out", heads="separate", **options)
    assert not (tmp_path / "out").exists()
    report = merge(names, tmp_path / "kept", heads="keep:b", **options)
    assert list(report["kept"]) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    found = with_peft(tmp_path / "kept")
    torch.testing.assert_close(found["classifier.weight"], two["classifier.weight"], rtol=0, atol=0)
    merge(names, tmp_path / "dropped", heads="drop", **options)
    assert not any("classifier" in name for name in load_file(tmp_path / "dropped" / "adapter_model.safetensors"))
    start = dict(tiny.bert().named_parameters())
    torch.testing.assert_close(with_peft(tmp_path / "dropped")["classifier.weight"], start["classifier.weight"])


def test_adapters_without_their_heads_load(tmp_path):
    """PEFT raises a KeyError for a module that the configuration has as saved and the file lacks."""
    adapter(tmp_path, "a", 1, lambda: tiny.bert(num_labels=2), r=2, **BERT)
    adapter(tmp_path, "b", 2, r=2, **BERT)
    names = [str(tmp_path / n) for n in "ab"]
    with pytest.raises(ValueError, match="heads of adapters cannot be kept apart"):
        merge(names, tmp_path / "out", method="average", heads="separate")
    merge(names, tmp_path / "out", method="average", heads="drop")
    assert with_peft(tmp_path / "out").keys() == dict(tiny.bert().named_parameters()).keys()
    assert config_of(tmp_path / "out")["modules_to_save"] is None


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.attention.self.query.lora_A.weight", "classifier.bias"])
@pytest.mark.parametrize("mode", ["concat", "svd"])
def test_nan_is_named(tmp_path, mode, name):
    """One broken adapter would spread over the merge, which would be written as if it were fine."""
    for other, seed in (("a", 1), ("b", 2)):
        adapter(tmp_path, other, seed, r=2, **BERT)
    file = tmp_path / "b" / "adapter_model.safetensors"
    broken = load_file(file)
    broken[f"base_model.model.{name}"].view(-1)[0] = torch.nan
    save_file(broken, file)
    with pytest.raises(ValueError, match=f"`base_model.model.{name}` of .*b holds NaN or inf"):
        merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average", adapters=mode)
    assert not (tmp_path / "out").exists()


GPT2 = {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
HIDDEN = {
    "layers": (
        {"r": 2, "target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h", **GPT2},
        {"r": 3, "target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h", **GPT2},
        tiny.gpt2,
    ),
    "excluded": (
        {"r": 2, **BERT, "exclude_modules": ["value"]},
        {"r": 3, **BERT},
        tiny.bert,
    ),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_nothing_of_the_first_configuration_hides_a_product(tmp_path, kind):
    """PEFT leaves out, without a word, what the first adapter's layers or exclusions leave out."""
    first, second, base = HIDDEN[kind]
    one, two = adapter(tmp_path, "a", 1, base, **first), adapter(tmp_path, "b", 2, base, **second)
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="task-arithmetic", adapters="concat")
    found, moved = with_peft(tmp_path / "out", base), 0
    for name, p in base().named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(found[name], one[name] + two[name] - p, rtol=1e-4, atol=1e-4)
            moved += not torch.equal(found[name], p)
    assert moved == 2


class Nested(torch.nn.Module):
    """A module whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = torch.nn.Linear(4, 4)
        self.sub = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("lin", "other", "third")})

    def forward(self, x):
        for layer in (self.lin, *self.sub.values()):
            x = layer(x)
        return x


def test_a_pattern_is_for_one_module(tmp_path):
    """PEFT takes a pattern for the end of a name: the rank of `lin` would be that of `sub.lin` too."""
    parts = {}
    for name, seed, rank, targets in (
        ("a", 1, 2, ["lin", "sub.other", "third"]),
        ("b", 2, 3, ["sub.lin", "other", "third"]),
    ):
        model = peft.get_peft_model(Nested(), peft.LoraConfig(r=rank, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) if p.requires_grad else p)
        model.save_pretrained(tmp_path / name)
        parts[name] = model.merge_and_unload().state_dict()
    names = [str(tmp_path / n) for n in "ab"]
    merge(names, tmp_path / "out", method="task-arithmetic", adapters="concat")
    found = peft.PeftModel.from_pretrained(Nested(), tmp_path / "out").merge_and_unload().state_dict()
    for name, start in Nested().state_dict().items():
        expected = parts["a"][name] + parts["b"][name] - start
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_a_module_is_low_rank_or_whole(tmp_path):
    """PEFT puts no product on a module that is saved as a whole."""
    adapter(tmp_path, "a", 1, r=2, target_modules=["query", "classifier"])
    adapter(tmp_path, "b", 2, r=2, **BERT)
    with pytest.raises(ValueError, match="`classifier` is low-rank in one adapter, and saved as a whole by another"):
        merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average", adapters="concat", heads="keep:b")


@pytest.mark.parametrize("mode", ["concat", "svd"])
@pytest.mark.parametrize(("own", "chosen", "expected"), [
    (torch.bfloat16, None, torch.bfloat16), (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float64, None, torch.float64), (torch.bfloat16, torch.float32, torch.float32),
])  # fmt: skip
def test_the_dtype_is_the_first_adapters_or_the_chosen_one(tmp_path, mode, own, chosen, expected):
    """`--dtype` did nothing for products, and adapters in bf16 came out twice as large."""
    parts = []
    for name, seed in (("a", 1), ("b", 2)):
        adapter(tmp_path, name, seed, r=2, **BERT)
        file = tmp_path / name / "adapter_model.safetensors"
        parts.append({n: t.to(own) for n, t in load_file(file).items()})
        save_file(parts[-1], file)
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average", adapters=mode, dtype=chosen)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in found.values()} == {expected}
    head = "base_model.model.classifier.weight"  # computed in fp32 at least, and rounded once
    exact = (parts[0][head].double() + parts[1][head].double()) / 2
    torch.testing.assert_close(found[head], exact.to(expected), rtol=1e-6, atol=1e-6)


def test_too_large_for_a_dtype_is_said(tmp_path):
    """A number that fp16 cannot hold would be written as inf."""
    adapter(tmp_path, "a", 1, r=2, lora_alpha=200_000, **BERT)
    with pytest.raises(ValueError, match=r"lora_B.weight` is too large for torch.float16. Choose another --dtype"):
        merge([str(tmp_path / "a")], tmp_path / "out", method="average", adapters="concat", dtype=torch.float16)


def test_svd_of_convolutions(tmp_path):
    """A convolution's factors have four dimensions; at full rank the approximation is exact."""
    one, two = (adapter(tmp_path, n, s, resnet, r=2, target_modules=["convolution"]) for n, s in (("a", 1), ("b", 2)))
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="task-arithmetic", adapters="concat")
    merge([str(tmp_path / "out")], tmp_path / "same", method="average", adapters="svd")
    for name, p in resnet().named_parameters():
        for directory in ("out", "same"):
            found = with_peft(tmp_path / directory, resnet)[name]
            torch.testing.assert_close(found, one[name] + two[name] - p, rtol=1e-4, atol=1e-4)
