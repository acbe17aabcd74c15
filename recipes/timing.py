"""Steps to be timed: an optimizer's own work on given gradients, and whole training steps of models."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_ivon import IVON

LOCAL = {"lr": 1e-3, "ess": 1e6, "hess_init": 0.1, "clip_radius": 1e-3}
# As the presets for finetuning have it: another estimator, and a prior at the start.
FISHER = {"hess_approx": "fisher", "batch_size": 16, "beta2": 0.98, "prior_mean": "init"}


def gpt2_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's 148 tensors, 124 million weights."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def minilm_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of MiniLM's 103 tensors, 23 million weights."""
    layer = [shape for _ in range(4) for shape in ((384, 384), (384,))] + [(384,), (384,)]
    layer += [(1536, 384), (1536,), (384, 1536), (384,), (384,), (384,)]
    return [(30522, 384), (512, 384), (2, 384), (384,), (384,), *layer * 6, (384, 384), (384,)]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "gpt2": gpt2_shapes,
    "minilm": minilm_shapes,
    "tiny": lambda: [(370,)] * 2000,
    "lora": lambda: [(8, 768), (2304, 8)] * 12,
}


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Return parameters of these shapes with small random values."""
    generator = torch.Generator(device).manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, device=device) * 0.02) for s in shapes]


def optimizers(names: list[str]) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Return how each optimizer is made; the authors' only if it is installed."""
    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "adamw fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "adamw foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "ivon fused": lambda params: IVON(params, fused=True, **LOCAL),
        "ivon fused, fisher": lambda params: IVON(params, fused=True, **LOCAL, **FISHER),
        "ivon fused, bf16 momentum": lambda params: IVON(params, fused=True, momentum_dtype="bfloat16", **LOCAL),
        "ivon fused, low memory": lambda params: IVON(params, fused=True, low_memory=True, **LOCAL),
        "ivon foreach": lambda params: IVON(params, fused=False, **LOCAL),
        "ivon plain": lambda params: IVON(params, fused=False, foreach=False, **LOCAL),
    }
    if importlib.util.find_spec("ivon"):
        authors = importlib.import_module("ivon").IVON
        made["ivon-opt"] = lambda params: authors(params, **LOCAL)
    return {name: make for name, make in made.items() if not names or name in names}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class OptimizerOnly:
    """The optimizer's own work in a step: gradients are given, and written as a backward pass would.

    Args:
        optimizer: Of the parameters.
        params: The parameters.
        contexts: Micro-batches of a step.
        twins: Parameters alike, of no optimizer. By how much the backward pass takes longer with the optimizer's hooks
            than with these counts as its work too.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        contexts: int,
        twins: list[nn.Parameter] | None = None,
    ) -> None:
        self.optimizer, self.params, self.contexts, self.twins = optimizer, params, contexts, twins
        self.grads = [torch.full_like(p, 1e-3) for p in params]
        self.sampled = hasattr(optimizer, "sampled_params")

    def run(self) -> float:
        """Run one step; returns its seconds without those of the stand-in for the backward pass."""
        device = self.params[0].device.type
        seconds = 0.0
        for p in [*self.params, *(self.twins or [])]:
            p.grad = None
        for _ in range(self.contexts):
            if not self.sampled:
                self.backward(self.params)
                continue
            context = self.optimizer.sampled_params(train=True)  # type: ignore[attr-defined]
            seconds += timed(context.__enter__, device)
            hooked = timed(lambda: self.backward(self.params), device)
            if self.twins is not None:
                seconds += hooked - timed(lambda: self.backward(self.twins), device)
            seconds += timed(lambda context=context: context.__exit__(None, None, None), device)
        return seconds + timed(self.optimizer.step, device)

    def backward(self, params: list[nn.Parameter]) -> None:
        """Give each parameter its gradient through autograd, so that hooks see it."""
        torch.autograd.backward(params, self.grads)


class WholeStep:
    """Forward, backward and step of a model."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, contexts: int, options: argparse.Namespace):
        from contextlib import nullcontext

        self.optimizer, self.model, self.contexts = optimizer, model, contexts
        self.device = next(model.parameters()).device.type
        self.bf16 = options.bf16
        config: Any = model.config
        shape = (options.batch_size, options.block_size)
        tokens = torch.randint(0, config.vocab_size, shape, device=self.device)
        is_classifier = config.model_type == "bert"
        self.batch = {"input_ids": tokens, "labels": tokens[:, 0] % 2 if is_classifier else tokens}
        self.context = getattr(optimizer, "sampled_params", lambda train: nullcontext())

    def run(self) -> float:
        """Run one step; returns its seconds."""
        return timed(self._step, self.device)

    def _step(self) -> None:
        for _ in range(self.contexts):
            with self.context(train=True):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    loss = self.model(**self.batch).loss / self.contexts
                loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gpt2(device: str) -> nn.Module:
    """Return GPT-2 of 124 million weights, untrained, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).to(device)


def minilm(device: str) -> nn.Module:
    """Return a classifier in MiniLM's shapes, untrained, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).to(device)


def lora(device: str) -> nn.Module:
    """Return GPT-2 with LoRA of rank 8 on the attention's first projections."""
    from peft import LoraConfig, get_peft_model

    model: Any = gpt2(device)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))


WHOLE: dict[str, Callable[[str], nn.Module]] = {"gpt2": gpt2, "minilm": minilm, "lora": lora}


def make_step(
    name: str,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    options: argparse.Namespace,
    with_twins: bool = False,
) -> OptimizerOnly | WholeStep:
    """Return a step of a model by an optimizer."""
    if options.whole_step:
        model = WHOLE[name](options.device)
        return WholeStep(make([p for p in model.parameters() if p.requires_grad]), model, options.contexts, options)
    params = parameters(SHAPES[name](), options.device)
    optimizer = make(params)
    with_twins = with_twins and hasattr(optimizer, "sampled_params")
    twins = parameters(SHAPES[name](), options.device) if with_twins else None
    return OptimizerOnly(optimizer, params, options.contexts, twins)
