"""Text from a posterior: next tokens by averaged probabilities, or the best of what several weight samples say."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from hf_ivon.draws import check_samples, weight_samples
from hf_ivon.mean import buffer_keys, posterior_keys, unwrap
from hf_ivon.mixture import Mixture
from hf_ivon.posterior import Posterior
from hf_ivon.predict import evaluation_mode

# What every weight sample would need one of its own of: state beside its cache, and outputs other than logits.
_REFUSED = (
    "assistant_early_exit",
    "assistant_model",
    "cache_implementation",
    "encoder_outputs",
    "guidance_scale",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "prompt_lookup_num_tokens",
    "use_mtp",
)


@torch.no_grad()
def posterior_generate(
    model: nn.Module,
    posterior: Posterior | Mixture | None,
    inputs: Mapping[str, Tensor],
    *,
    num_samples: int,
    seed: int = 0,
    ess_scale: float = 1.0,
    **generate_kwargs: Any,
) -> Any:
    r"""Generate text, each token by its probability averaged over the posterior.

    .. math:: p(y_t | y_{<t}) = \frac1S \sum_s p(y_t | y_{<t}, \theta_s)

    Greedy search, sampling and beam search of the model's own `generate` see the logarithm of the average as logits;
    temperature, top-k and the like act on it. Every token costs S forward passes. The S weight samples are drawn once
    and kept, which takes S times the memory of the tensors that the posterior is over (little for an adapter). Each
    has its own cache of keys and values, and in an encoder-decoder its own encoding of the input. Afterwards the
    weights are the mean, bit for bit.

    Args:
        model: A causal language model of Transformers, or an encoder-decoder such as T5 and BART, also as a PEFT model
            with a LoRA adapter.
        posterior: The posterior that belongs to the model, or a mixture; may be None when `num_samples` is 0.
        inputs: What a tokenizer returns: `input_ids` of shape (batch, length), for a decoder alone padded on the left,
            and `attention_mask`.
        num_samples: Number of weight samples S; 0 generates at the mean.
        seed: Chooses the weight samples. Tokens are sampled from torch's global generator, as `generate` does.
        ess_scale: Factor on the precision of the posterior, > 0; below 1 it is wider than it was saved.
        generate_kwargs: Passed to `generate`, such as `max_new_tokens`.

    Returns:
        What `generate` returns: token ids of shape (batch, length), prompt and continuation, of an encoder-decoder the
        continuation alone; or its output class, whose `scores` are logarithms of averaged probabilities.

    Raises:
        ValueError: If `num_samples` is negative, the posterior does not belong to the model, the model is an
            encoder-decoder with a `generate` of its own, such as Whisper, or an argument asks for what cannot be
            averaged.

    Source:
        arXiv:2503.05318, which calls it the token-level posterior.
    """
    check_samples(posterior, num_samples, seed)
    inner = _language_model(model)
    with evaluation_mode(inner):
        if not num_samples or posterior is None:
            return inner.generate(**inputs, **generate_kwargs)
        defaults = copy.copy(inner.generation_config)
        defaults.cache_implementation = None  # the caches are made here
        for name in _REFUSED:
            _check_setting(name, _setting(name, {**inputs, **generate_kwargs}, defaults))
        average = _Averaged(inner, defaults, _draw(model, inner, posterior, num_samples, seed, ess_scale))
        return average.generate(**inputs, **generate_kwargs)


def _language_model(model: nn.Module) -> Any:
    """Return the Transformers model inside wrappers, if it is one whose next tokens can be averaged."""
    inner: Any = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not hasattr(inner, "generate") or not inner.can_generate():
        raise ValueError(f"`model` must be able to generate, got {type(inner).__name__}. Load it as a language model.")
    if inner.config.is_encoder_decoder and type(inner).generate is not GenerationMixin.generate:
        raise ValueError(
            f"`model` must have the `generate` of all models, got the encoder-decoder {type(inner).__name__}, which "
            f"has one of its own. Choose among the texts of `sample_generations` by `minimum_bayes_risk`."
        )
    return inner


def _setting(name: str, given: Mapping[str, Any], defaults: Any) -> Any:
    """Return a setting as `generate` finds it: an argument's, the given configuration's, or the model's own."""
    if name in given:
        return given[name]
    value = getattr(given.get("generation_config"), name, None)
    return getattr(defaults, name, None) if value is None else value


def _check_setting(name: str, value: Any) -> None:
    """Refuse what cannot be averaged; False, and a guidance scale of 1, ask for nothing."""
    if value is None or value is False or (name == "guidance_scale" and value == 1):
        return
    raise ValueError(
        f"`{name}` must be left out where several weight samples generate together, also of a generation "
        f"configuration. Use it in a plain `generate` inside `posterior.sampled`."
    )


def _draw(
    model: nn.Module, inner: nn.Module, posterior: Posterior | Mixture, num_samples: int, seed: int, ess_scale: float
) -> list[dict[str, Tensor]]:
    """Return weight samples by the names of the inner model's tensors."""
    names = {tensor: name for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]}
    keys: dict[str, Tensor] = dict(posterior_keys(model))
    if isinstance(posterior, Mixture):
        keys |= buffer_keys(model)
    drawn = posterior.names() if isinstance(posterior, Posterior) else list(keys)
    samples = []
    for weights in weight_samples(model, posterior, num_samples=num_samples, seed=seed, ess_scale=ess_scale):
        with weights:
            if lost := [k for k in drawn if keys[k] not in names]:
                raise ValueError(
                    f"The posterior must be over weights of {type(inner).__name__}, got `{lost[0]}`. Prompts that are "
                    f"learnt cannot be averaged here; use LoRA."
                )
            samples.append({names[keys[k]]: keys[k].detach().clone() for k in drawn})
    return samples


class _Caches:
    """The cache of the first weight sample, with those of the others beside it: put before its class in the bases."""

    others: Sequence[Any] = ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for cache in self.others:
            cache.reorder_cache(beam_idx)


class _DecoderCaches(_Caches, DynamicCache):
    pass


class _EncoderDecoderCaches(_Caches, EncoderDecoderCache):
    pass


def _caches(config: Any, num_samples: int) -> _Caches:
    """Return empty caches, of the class and the size that `generate` would make."""

    def one() -> Any:
        dynamic = {"config": config.get_text_config(decoder=True)}
        if config.is_encoder_decoder:
            return _EncoderDecoderCaches(DynamicCache(**dynamic), DynamicCache(**dynamic))
        return _DecoderCaches(**dynamic)

    first: _Caches = one()
    first.others = [one() for _ in range(num_samples - 1)]
    return first


class _Encode(nn.Module):
    """A model whose forward pass is that of its encoder; weights have the names of the whole model, below `model`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model.get_encoder()(**kwargs)


def _own(encoded: Any, index: int) -> Any:
    """Return what the encoder of one weight sample gave, out of all of them side by side."""
    return type(encoded)(**{k: v[:, index] if isinstance(v, Tensor) else v for k, v in encoded.items()})


class _Averaged:
    """A model's `generate`, with a forward pass that averages over weight samples."""

    def __init__(self, model: Any, defaults: Any, weights: list[dict[str, Tensor]]) -> None:
        self.model, self.weights = model, weights
        # A shallow copy has the same weights and modules, but a forward pass of its own: the model is not touched.
        self.front = copy.copy(model)
        self.front.generation_config = defaults
        self.front.forward = functools.update_wrapper(functools.partial(self.forward), model.forward)
        if model.config.is_encoder_decoder:
            plain = model.get_encoder()
            encoder = copy.copy(plain)
            encoder.forward = functools.update_wrapper(functools.partial(self.encode), plain.forward)
            self.front.get_encoder = lambda: encoder

    def generate(self, **kwargs: Any) -> Any:
        if _setting("use_cache", kwargs, self.front.generation_config) is not False:
            if "past_key_values" not in inspect.signature(self.model.forward).parameters:
                raise ValueError(self._other_cache())
            kwargs["past_key_values"] = _caches(self.model.config, len(self.weights))
        return self.front.generate(**kwargs)

    def encode(self, **kwargs: Any) -> Any:
        """Return the encoder's outputs at every weight sample, side by side: tensors of shape (batch, S, ...)."""
        encoder = _Encode(self.model)
        found = [
            functional_call(encoder, {f"model.{name}": w for name, w in weights.items()}, kwargs=kwargs)
            for weights in self.weights
        ]
        # Not in front of the batch: `generate` repeats what is in the first place, once for each beam.
        side_by_side = {
            k: torch.stack([one[k] for one in found], dim=1) for k, v in found[0].items() if isinstance(v, Tensor)
        }
        return type(found[0])(**side_by_side)

    def forward(self, *args: Any, past_key_values: Any = None, encoder_outputs: Any = None, **kwargs: Any) -> Any:
        caches = [] if past_key_values is None else [past_key_values, *past_key_values.others]
        total = torch.zeros(())
        for index, weights in enumerate(self.weights):
            own = {"past_key_values": caches[index]} if caches else {}
            if encoder_outputs is not None:
                own["encoder_outputs"] = _own(encoder_outputs, index)
            output = functional_call(self.model, weights, args, {**kwargs, **own})
            if caches and output.get("past_key_values") is not caches[index]:
                raise ValueError(self._other_cache())
            log_p = output.logits.float().log_softmax(dim=-1)
            total = log_p if index == 0 else torch.logaddexp(total, log_p)
        output.logits = total - math.log(len(self.weights))
        if caches:
            output.past_key_values = past_key_values  # which brings all of them back with the next token
        return output

    def _other_cache(self) -> str:
        return f"`use_cache` must be False for {type(self.model).__name__}, whose cache is of a kind of its own."


@torch.no_grad()
def sample_generations(
    model: nn.Module,
    posterior: Posterior | Mixture | None,
    inputs: Mapping[str, Tensor],
    *,
    num_samples: int,
    seed: int = 0,
    ess_scale: float = 1.0,
    **generate_kwargs: Any,
) -> list[Any]:
    """Generate with each of several weight samples in turn, for `minimum_bayes_risk` to choose from.

    One weight sample is in the model at a time; afterwards its weights are the mean again, bit for bit.

    Args:
        model: Any model that can generate, also an encoder-decoder.
        posterior: The posterior that belongs to the model, or a mixture; may be None when `num_samples` is 0.
        inputs: What a tokenizer returns: `input_ids` of shape (batch, length) and `attention_mask`.
        num_samples: Number of weight samples S; 0 generates once, at the mean.
        seed: Chooses the weight samples. Tokens are sampled from torch's global generator, as `generate` does.
        ess_scale: Factor on the precision of the posterior, > 0; below 1 it is wider than it was saved.
        generate_kwargs: Passed to `generate`, such as `do_sample` and `num_return_sequences`.

    Returns:
        What `generate` returns, once for each weight sample: token ids of shape (batch * num_return_sequences,
        length), whose length differs.

    Raises:
        ValueError: If `num_samples` is negative, or the posterior does not belong to the model.
    """
    check_samples(posterior, num_samples, seed)
    plain: Any = unwrap(model)
    results = []
    with evaluation_mode(plain):
        for weights in weight_samples(model, posterior, num_samples=num_samples, seed=seed, ess_scale=ess_scale):
            with weights:
                results.append(plain.generate(**inputs, **generate_kwargs))
    return results


@dataclass(frozen=True)
class Choice:
    """The text of least expected risk.

    Args:
        text: The text.
        utilities: Expected utility of every text it was chosen from, in the unit of the utility.
    """

    text: str
    utilities: dict[str, float]

    @property
    def utility(self) -> float:
        """Expected utility of the chosen text; where it is low, the weight samples disagree."""
        return self.utilities[self.text]


def unigram_f1(hypothesis: str, reference: str) -> float:
    """Return the F1 of the words of two texts, counted with repetitions, in [0, 1].

    Args:
        hypothesis: A text.
        reference: Another one.

    Returns:
        Harmonic mean of the shares of words of each that the other one has; 1 if both are empty.

    Examples:
        >>> unigram_f1("a cat sat", "a cat sat down there")
        0.75
    """
    a, b = Counter(hypothesis.split()), Counter(reference.split())
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def minimum_bayes_risk(
    hypotheses: Sequence[Sequence[str]],
    utility: Callable[[str, str], float] = unigram_f1,
    *,
    pooled: bool = True,
) -> Choice:
    r"""Choose among what several weight samples say the text that is, on average, most like all the others.

    With :math:`H_s` the texts of weight sample s and :math:`H` all of them, pooled it is
    :math:`\arg\max_{y \in H} \frac{1}{|H|} \sum_{y' \in H} u(y, y')`. Otherwise each weight sample judges only its own
    texts, by its own: :math:`\arg\max_y \sum_{s: y \in H_s} \frac{1}{|H_s|} \sum_{y' \in H_s} u(y, y')`, which asks
    for far fewer utilities, and prefers texts that several of them say.

    Args:
        hypotheses: Texts for one input, by weight sample; repetitions count as often as they occur.
        utility: How good the first text is if the second is right; larger is better. For translation pass a metric
            such as sacrebleu's sentence score.
        pooled: Whether all texts are compared with all.

    Returns:
        The chosen text, the first one of equals, and the utilities.

    Raises:
        ValueError: If a weight sample has no text.

    Source:
        arXiv:2503.05318, Equation 9 (pooled) and Equation 10, as its authors' code computes them.

    Examples:
        >>> minimum_bayes_risk([["a cat sat", "a dog"], ["a cat sat down"]]).text
        'a cat sat'
    """
    if not hypotheses or not all(hypotheses):
        raise ValueError(
            f"`hypotheses` must have at least one text for each weight sample, got {[len(h) for h in hypotheses]}. "
            f"Leave out weight samples without any."
        )
    groups = [[text for group in hypotheses for text in group]] if pooled else hypotheses
    utilities: dict[str, float] = {}
    for group in groups:
        references = Counter(group)
        for text in references:
            gain = sum(count * utility(text, other) for other, count in references.items())
            utilities[text] = utilities.get(text, 0.0) + gain / len(group)
    return Choice(max(utilities, key=utilities.__getitem__), utilities)
