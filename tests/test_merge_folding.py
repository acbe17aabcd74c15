"""Folding merged adapters into their base: what PEFT's own merge gives, in a model that loads without PEFT."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from hf_ivon.merge import merge
from tests import tiny
from tests.test_merge_adapters import BERT, KINDS, adapter, with_peft


@pytest.mark.parametrize("method", ["gaussian", "concat"])
@pytest.mark.parametrize("kind", ["ranks", "transposed", "embeddings"])
def test_folding_is_what_peft_does(tmp_path, kind, method):
    """The whole model must load without PEFT and be what PEFT's own merge of the adapter gives."""
    first, _, base = KINDS[kind]
    adapter(tmp_path, "a", 1, base, **first)
    adapter(tmp_path, "b", 2, base, **first)
    names = [str(tmp_path / n) for n in "ab"]
    options = {"method": "gaussian"} if method == "gaussian" else {"method": "average", "adapters": "concat"}
    merge(names, tmp_path / "adapter", **options)
    merge(names, tmp_path / "whole", into_base=True, **options)
    assert not list((tmp_path / "whole").glob("adapter*")) + list((tmp_path / "whole").glob("posterior*"))
    cls = GPT2LMHeadModel if base is tiny.gpt2 else BertForSequenceClassification
    found, expected = cls.from_pretrained(tmp_path / "whole"), with_peft(tmp_path / "adapter", base)
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
