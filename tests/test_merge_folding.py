"""Folding merged adapters into their base: what PEFT's own merge gives, in a model that loads without PEFT."""

import json

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetForImageClassification,
)

from hf_ivon.merge import merge
from tests import tiny
from tests.test_merge_adapters import BERT, GPT2, KINDS, adapter, config_of, resnet, with_peft


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def folded(directory, **options):
    """Merge `a` and `b` into their base and return the file's tensors."""
    names = [str(directory / name) for name in "ab" if (directory / name).exists()]
    merge(names, directory / "whole", into_base=True, **{"method": "average", **options})
    return load_file(directory / "whole" / "model.safetensors")


def pair(directory, base=tiny.bert, **config):
    for name, seed in (("a", 1), ("b", 2)):
        adapter(directory, name, seed, base, **config)


MORE = {
    "convolutions": ({"r": 2, "target_modules": ["convolution"]}, None, resnet),
    # PEFT saves the weights of these beside the products.
    "ends": ({"r": 2, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}, None, llama),
    # Which has the layers' weights transposed, and that of its end not.
    "mixed": ({"r": 2, "target_modules": ["c_attn", "lm_head"]}, None, lambda: tiny.gpt2(tie_word_embeddings=False)),
}
CLASSES = {tiny.bert: BertForSequenceClassification, resnet: ResNetForImageClassification, llama: LlamaForCausalLM}


@pytest.mark.parametrize("method", ["gaussian", "concat"])
@pytest.mark.parametrize("kind", ["ranks", "transposed", "embeddings", *MORE])
def test_folding_is_what_peft_does(tmp_path, kind, method):
    """The whole model must load without PEFT and be what PEFT's own merge of the adapter gives."""
    first, _, base = (KINDS | MORE)[kind]
    pair(tmp_path, base, **first)
    names = [str(tmp_path / n) for n in "ab"]
    options = {"method": "gaussian"} if method == "gaussian" else {"method": "average", "adapters": "concat"}
    merge(names, tmp_path / "adapter", **options)
    merge(names, tmp_path / "whole", into_base=True, **options)
    assert not list((tmp_path / "whole").glob("adapter*")) + list((tmp_path / "whole").glob("posterior*"))
    found = CLASSES.get(base, GPT2LMHeadModel).from_pretrained(tmp_path / "whole")
    expected = with_peft(tmp_path / "adapter", base)
    strays = load_file(tmp_path / "whole" / "model.safetensors").keys() - found.state_dict().keys()
    assert not strays
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)


def test_an_encoder_alone_gets_the_head(tmp_path):
    """The base may be an encoder without the classifier and without its prefix; the result is the classifier."""
    adapter(tmp_path, "a", 1, r=2, **BERT)
    tiny.bert().bert.save_pretrained(tmp_path / "encoder")
    adapter(tmp_path, "b", 2, r=2, **BERT)
    names = [str(tmp_path / n) for n in "ab"]
    merge(names, tmp_path / "adapter", method="average")
    merge(names, tmp_path / "whole", method="average", base_model=tmp_path / "encoder", into_base=True)
    found, expected = (
        BertForSequenceClassification.from_pretrained(tmp_path / "whole"),
        with_peft(tmp_path / "adapter"),
    )
    assert found.num_labels == 3
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-5)


def test_a_base_without_the_module_is_named(tmp_path):
    """Folding into another model would leave half of the adapter out."""
    adapter(tmp_path, "a", 1, r=2, **BERT)
    tiny.gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="lacks `bert.encoder.*`, which the adapter changes"):
        merge([str(tmp_path / "a")], tmp_path / "out", method="average", base_model=tmp_path / "other", into_base=True)
    assert not (tmp_path / "out").exists()
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")


def test_another_base_is_refused(tmp_path):
    """A change of other rows, or of codes in place of weights, is none of the adapter's."""
    pair(tmp_path, r=2, **BERT)
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    for wrong, message in (
        (torch.zeros(16, 20), r"has shape \(16, 20\) in .*base, and the adapter's change of it \(16, 16\)"),
        (base[name].to(torch.int8), "of .*base is quantized: name the base model that it was made of by --base-model"),
        (base[name] / 0, "of .*base holds NaN or inf, or with the change is too large for torch.float32"),
    ):
        save_file(base | {name: wrong}, tmp_path / "base" / "model.safetensors")
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            folded(tmp_path)
        assert not (tmp_path / "whole").exists()


def test_weights_of_nowhere_are_refused(tmp_path):
    """Trained vectors of single tokens were written beside the model, which does not know them."""
    config = {"r": 2, "target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [1, 2]}}
    adapter(tmp_path, "a", 1, **config)
    with pytest.raises(
        ValueError, match="a has `bert.embeddings.word_embeddings.*delta`, which is no weight of .*base"
    ):
        folded(tmp_path)


def test_a_square_weight_of_unknown_order_is_refused(tmp_path):
    """PEFT's configuration says what holds for the last layer: the transpose would be added to the others."""
    base = lambda: tiny.gpt2(tie_word_embeddings=False)  # noqa: E731
    adapter(tmp_path, "a", 1, base, r=2, target_modules=["c_proj", "lm_head"])
    assert not config_of(tmp_path / "a")["fan_in_fan_out"]
    with pytest.raises(ValueError, match="does not tell whether `transformer.h.0.attn.c_proj.weight` is transposed"):
        folded(tmp_path)


def test_converted_adapters_are_folded(tmp_path):
    """PiSSA is refused with a word of PEFT's conversion: what that writes must be what was trained."""
    tiny.bert().save_pretrained(tmp_path / "base")
    model = tiny.bert()
    model.name_or_path = str(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["query"]))
    model.save_pretrained(tmp_path / "start")
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape) if p.requires_grad else 0)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected, found = model.merge_and_unload().state_dict(), folded(tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_there_is_said(tmp_path):
    """PEFT's conversion leaves the head out: the model would have that of the base, which was not trained."""
    adapter(tmp_path, "a", 1, r=2, **BERT)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lora" in name}, file)
    for options in ({"into_base": True}, {"adapters": "concat"}):
        with pytest.raises(
            ValueError, match="a has no weights of its `modules_to_save`, classifier, score: copy them"
        ):
            merge([str(tmp_path / "a")], tmp_path / "out", method="average", **options)


def resize(model):
    model.resize_token_embeddings(33, mean_resizing=False)


@pytest.mark.parametrize("base", [tiny.gpt2, lambda: tiny.gpt2(tie_word_embeddings=False)], ids=["tied", "untied"])
def test_resized_embeddings(tmp_path, base):
    """An adapter that was trained with more tokens has the embeddings whole; the model must say its new size."""
    pair(tmp_path, base, prepare=resize, r=2, target_modules=["c_attn"], **GPT2)
    folded(tmp_path)
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "adapter", method="average")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")

    def larger():
        model = base()
        resize(model)
        return model

    for name, p in with_peft(tmp_path / "adapter", larger).items():
        torch.testing.assert_close(found.get_parameter(name), p, rtol=1e-4, atol=1e-5)


def test_the_start_is_not_what_is_folded_into(tmp_path):
    """The rules that start from an adapter name it as the base: then the adapters' own base is folded into."""
    pair(tmp_path, r=2, **BERT)
    adapter(tmp_path, "start", 3, r=2, **BERT)
    for method in ("uncertainty", "task-arithmetic"):
        options = {"method": method, "base_model": tmp_path / "start"}
        merge([str(tmp_path / n) for n in "ab"], tmp_path / method, **options)
        merge([str(tmp_path / n) for n in "ab"], tmp_path / f"{method}-whole", into_base=True, **options)
        found = load_file(tmp_path / f"{method}-whole" / "model.safetensors")
        for name, p in with_peft(tmp_path / method).items():
            torch.testing.assert_close(found[name], p, rtol=1e-4, atol=1e-5)


def test_the_start_has_the_same_scale(tmp_path):
    """Differences from a start of another scale would be differences of other products."""
    pair(tmp_path, r=2, **BERT)
    adapter(tmp_path, "start", 3, r=2, lora_alpha=32, **BERT)
    with pytest.raises(ValueError, match=r"differ in `lora_alpha` \(8 in .*a, 8 in .*b, 32 in .*start\)"):
        merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", base_model=tmp_path / "start")


def test_a_tagger_of_an_encoder_loads(tmp_path):
    """An encoder's configuration knows neither the class nor the number of labels."""
    pair(tmp_path, tiny.tagger, r=2, target_modules=["query", "value"], task_type="TOKEN_CLS")
    encoder = tiny.tagger().bert
    encoder.config.num_labels = 2
    encoder.save_pretrained(tmp_path / "encoder")
    folded(tmp_path, base_model=tmp_path / "encoder")
    merge([str(tmp_path / n) for n in "ab"], tmp_path / "adapter", method="average")
    found = BertForTokenClassification.from_pretrained(tmp_path / "whole")
    assert (found.config.architectures, found.num_labels) == (["BertForTokenClassification"], 4)
    for name, p in with_peft(tmp_path / "adapter", tiny.tagger).items():
        torch.testing.assert_close(found.get_parameter(name), p, rtol=1e-4, atol=1e-5)


def test_the_revision_of_the_base(tmp_path, monkeypatch):
    """The base may have moved on since the adapter was trained."""
    asked = []

    def download(repository, revision=None, **_):
        asked.append((repository, revision))
        return str(tmp_path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pair(tmp_path, r=2, **BERT)
    for name in "ab":
        config_of(tmp_path / name, base_model_name_or_path="me/base", revision="abc123")
    folded(tmp_path)
    assert asked == [("me/base", "abc123")]
    config_of(tmp_path / "b", revision=None)
    with pytest.raises(ValueError, match="do not name one base model and revision to fold into: name it by --base-m"):
        merge([str(tmp_path / n) for n in "ab"], tmp_path / "out", method="average", into_base=True)


@pytest.mark.parametrize("adapters", [None, "concat"])
@pytest.mark.parametrize("chosen", [None, torch.float16])
def test_folding_rounds_once_and_to_one_dtype(tmp_path, adapters, chosen):
    """The result was of two dtypes with `--dtype`, and was rounded as an adapter before it was as a model."""
    pair(tmp_path, lambda: tiny.bert().to(torch.bfloat16), r=2, **BERT)
    for name in "ab":
        file = tmp_path / name / "adapter_model.safetensors"
        save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file)
    tiny.bert().bert.to(torch.bfloat16).save_pretrained(tmp_path / "encoder")  # which has no dtype for the head
    found = folded(tmp_path, adapters=adapters, dtype=chosen, base_model=tmp_path / "encoder")
    wanted = chosen or torch.bfloat16
    assert {t.dtype for t in found.values()} == {wanted}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    parts = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    name = "bert.encoder.layer.0.attention.self.query"
    downs, ups = ([p[f"base_model.model.{name}.lora_{x}.weight"].double() for p in parts] for x in "AB")
    if adapters is None:
        change = sum(ups) / 2 @ (sum(downs) / 2)
    else:
        change = (ups[0] @ downs[0] + ups[1] @ downs[1]) / 2
    start = load_file(tmp_path / "encoder" / "model.safetensors")[name.removeprefix("bert.") + ".weight"]
    exact = start.double() + 8 / 2 * change
    # Half a unit in the last place, and a little for fp32.
    bound = torch.finfo(wanted).eps * exact.abs() / 2 + 1e-5
    assert ((found[f"{name}.weight"].double() - exact).abs() <= bound).all()
