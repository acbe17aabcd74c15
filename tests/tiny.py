"""Tiny models and data sets, built from configurations: nothing is downloaded."""

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from hf_ivon import IVONTrainingArguments
from hf_ivon.mean import mean_digest, posterior_keys
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig

VOCABULARY = 29
LENGTH = 8


def gpt2(dropout=0.0, seed=1, **config):
    """A causal language model with tied embeddings, 2 layers, about 8,000 weights."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0, **config))
    model.loss_type = "ForCausalLM"  # GPT-2 names none; then the Trainer's divisor counts labels at position 0 too
    return model


def bert(num_labels=3, seed=1, **config):
    """A sentence classifier, or a regressor with one label."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "max_position_embeddings": LENGTH, "num_labels": num_labels}
    return BertForSequenceClassification(BertConfig(**sizes, **more, **config))


def text(num=24, ragged=False, seed=2):
    """Blocks of tokens with labels; ragged ones have labels on 2 to 8 tokens only."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, VOCABULARY, (num, LENGTH), generator=generator)
    labelled = torch.randint(2, LENGTH + 1, (num, 1), generator=generator) if ragged else LENGTH
    labels = torch.where(torch.arange(LENGTH) < labelled, rows, -100)
    return [{"input_ids": r, "labels": t} for r, t in zip(rows, labels, strict=True)]


def sentences(num=24, num_labels=3, seed=2):
    """Sentences with a class each, or a number if there is one label."""
    rows = torch.randint(1, VOCABULARY, (num, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": r, "labels": int(r[0]) % num_labels if num_labels > 1 else float(r[0]) / 10} for r in rows]


def arguments(directory, **settings):
    """Training arguments on the CPU: 4 steps of 4 examples, large enough to move the Hessian, logging every step."""
    defaults = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if settings.get("optim", "ivon") == "ivon":
        defaults |= {"ivon_ess": 1e4, "ivon_hess_init": 0.1, "ivon_beta2": 0.9, "weight_decay": 1e-3}
    return IVONTrainingArguments(**{**defaults, **settings})


def save_gpt2(directory, sentences, n_positions):
    """Save a tiny GPT-2 and a tokenizer trained on sentences, as a download would leave them; return the tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences, vocab_size=300, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    sizes = {"vocab_size": len(tokenizer), "n_positions": n_positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def tagger(num_labels=4, seed=1, **config):
    """A classifier of tokens."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "max_position_embeddings": 2 * LENGTH, "num_labels": num_labels}
    return BertForTokenClassification(BertConfig(**sizes, **more, **config)).eval()


def posterior_of(model, std=0.1):
    """A posterior of random widths around `std` over all of a model's weights."""
    generator = torch.Generator().manual_seed(7)
    variance = {
        name: (std * (0.5 + torch.rand(p.shape, generator=generator))) ** 2
        for name, p in posterior_keys(model).items()
    }
    digest = mean_digest(posterior_keys(model))
    return Posterior(variance, PosteriorConfig(1.0, 0.0, 1.0, None, None, 1, (0.9, 0.99), "ivon-price", digest))


def tokenizer():
    """Words in pieces, as BERT has them: "colder" is "cold" and "##er". It knows as many tokens as the models."""
    words = (
        "the a was is film tea cold warm good bad in rome alice bob went to and very not . ##er ##est ##s ##ly".split()
    )
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    assert len(vocabulary) <= VOCABULARY
    pieces = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = BertPreTokenizer()
    pieces.decoder = WordPieceDecoder()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    pieces.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=LENGTH, **special)
