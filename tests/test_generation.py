"""Generation from a posterior: against loops without a cache, the plain model in the limit, and the way back."""

import threading

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_ivon.draws import sample_generator
from hf_ivon.generation import minimum_bayes_risk, posterior_generate, sample_generations, unigram_f1
from hf_ivon.mixture import Mixture
from tests import tiny


def llama(**config):
    """A language model with rotary positions, separate output weights, and a window of attention if asked for."""
    torch.manual_seed(1)
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, **config)).eval()


def gpt2():
    return tiny.gpt2(pad_token_id=0).eval()


def t5():
    """An encoder-decoder with tied embeddings, relative positions."""
    torch.manual_seed(1)
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, **special, num_layers=2)).eval()


def bart():
    """An encoder-decoder with learnt positions."""
    torch.manual_seed(1)
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "max_position_embeddings": 32, "init_std": 0.3}
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
              (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **layers, **special, forced_eos_token_id=None)).eval()


DECODERS = {"gpt2": gpt2, "llama": llama}
ENCODER_DECODERS = {"t5": t5, "bart": bart}
MODELS = DECODERS | ENCODER_DECODERS
PROMPTS = {
    "input_ids": torch.tensor([[3, 9, 4], [0, 5, 11]]),
    "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def averaged_next_token(model, posterior, ids, num_samples, seed):
    """Logarithm of the averaged probabilities of the next token, from the whole text, one draw after the other."""
    total = 0
    for index in range(num_samples):
        with posterior.sampled(model, sample_generator(seed, index)), torch.no_grad():
            total = total + model(input_ids=ids).logits[:, -1].double().softmax(-1)
    return (total / num_samples).log()


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_search_is_the_loop_without_a_cache(name):
    """With one cache for all, or caches at the wrong place, tokens after the first come from other texts' keys."""
    model = MODELS[name]()
    posterior = tiny.posterior_of(model, std=0.3)
    ids = PROMPTS["input_ids"][:1]
    found = posterior_generate(
        model,
        posterior,
        {"input_ids": ids},
        num_samples=3,
        seed=5,
        max_new_tokens=5,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for step in range(5):
        expected = averaged_next_token(model, posterior, ids, 3, 5)
        torch.testing.assert_close(found.scores[step].double(), expected, rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, expected.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found.sequences, ids)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 5}, {"num_beams": 3}])
@pytest.mark.parametrize("name", MODELS)
def test_a_posterior_without_width_generates_as_the_model_does(name, options):
    """Padding, sampling and beams have to be `generate`'s own; only the probabilities may differ."""
    model = MODELS[name]()
    posterior = tiny.posterior_of(model, std=1e-12)
    settings = {"max_new_tokens": 5, **options}
    torch.manual_seed(11)
    plain = model.generate(**PROMPTS, **settings)
    torch.manual_seed(11)
    assert torch.equal(posterior_generate(model, posterior, PROMPTS, num_samples=2, **settings), plain)
    torch.manual_seed(11)
    assert torch.equal(posterior_generate(model, None, PROMPTS, num_samples=0, **settings), plain)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_greedy_search_of_an_encoder_decoder_is_the_loop_without_a_cache(name):
    """A decoder that reads another weight sample's encoding, or the mean's, is a model that nobody has drawn."""
    model = ENCODER_DECODERS[name]()
    posterior, before = tiny.posterior_of(model, std=0.3), weights_of(model)
    found = posterior_generate(
        model,
        posterior,
        PROMPTS,
        num_samples=3,
        seed=5,
        max_new_tokens=5,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = torch.full((2, 1), model.config.decoder_start_token_id)
    for step in range(5):
        total = 0
        for index in range(3):
            with posterior.sampled(model, sample_generator(5, index)), torch.no_grad():
                total = total + model(**PROMPTS, decoder_input_ids=ids).logits[:, -1].double().softmax(-1)
        torch.testing.assert_close(found.scores[step].double(), (total / 3).log(), rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, total.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found.sequences, ids)
    assert not torch.equal(ids, model.generate(**PROMPTS, max_new_tokens=5, eos_token_id=None))
    assert unchanged(model, before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["llama", *ENCODER_DECODERS])
def test_the_cache_changes_nothing(name, options):
    """Beams change places in every step; a cache that is not moved along belongs to another beam."""
    model = MODELS[name]()
    posterior = tiny.posterior_of(model, std=0.3)
    settings = {"num_samples": 3, "max_new_tokens": 6, "eos_token_id": None, **options}
    with_cache = posterior_generate(model, posterior, PROMPTS, **settings)
    assert torch.equal(posterior_generate(model, posterior, PROMPTS, use_cache=False, **settings), with_cache)
    assert len(with_cache) == 2 * options.get("num_return_sequences", 1)
    assert not torch.equal(with_cache[:2], model.generate(**PROMPTS, max_new_tokens=6, eos_token_id=None)[:2])


def test_a_mixture_shares_out_the_samples():
    """Each component has its turn, by its own mean: here two different models, without any width."""
    members = [tiny.gpt2(seed=s).eval() for s in (1, 2)]
    mixture = Mixture([weights_of(m) for m in members], [None, None])
    ids = PROMPTS["input_ids"][:1]
    scores = posterior_generate(
        gpt2(),
        mixture,
        {"input_ids": ids},
        num_samples=2,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
    ).scores[0]
    with torch.no_grad():
        expected = sum(m(input_ids=ids).logits[:, -1].softmax(-1) for m in members) / 2
    torch.testing.assert_close(scores.exp(), expected)


def test_an_adapters_posterior_generates():
    """LoRA is where S weight samples cost next to nothing; their names are those of the adapter's file."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    posterior = tiny.posterior_of(model, std=0.3)
    before = weights_of(model)
    settings = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    ids = PROMPTS["input_ids"][:1]
    found = posterior_generate(model, posterior, {"input_ids": ids}, num_samples=2, **settings)
    expected = averaged_next_token(model, posterior, ids, 2, 0)
    torch.testing.assert_close(found.scores[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert unchanged(model, before)


@pytest.mark.parametrize("generate", [posterior_generate, sample_generations])
def test_an_interrupt_leaves_the_mean_and_the_modes(generate):
    """Generation is what people interrupt; the next request must not meet a weight sample, nor a lock."""
    model = llama().train()
    posterior, before = tiny.posterior_of(model), weights_of(model)

    def interrupt(ids, scores):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate(model, posterior, PROMPTS, num_samples=2, max_new_tokens=4, logits_processor=[interrupt])
        assert unchanged(model, before)
        assert model.training
        assert "forward" not in vars(model)


def test_threads_take_turns():
    """Two requests at a time would generate with each other's weights."""
    model = llama()
    posterior = tiny.posterior_of(model, std=0.3)
    settings = {"num_samples": 2, "max_new_tokens": 4}
    expected = {seed: posterior_generate(model, posterior, PROMPTS, seed=seed, **settings) for seed in range(4)}
    found = {}

    def request(seed):
        found[seed] = posterior_generate(model, posterior, PROMPTS, seed=seed, **settings)

    threads = [threading.Thread(target=request, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_weight_sample_generates_alone(name):
    """Hypotheses of the mean, or of one draw again and again, are no sample of the posterior."""
    model = MODELS[name]()
    posterior = tiny.posterior_of(model, std=0.5)
    found = sample_generations(model, posterior, PROMPTS, num_samples=3, seed=2, max_new_tokens=6)
    assert len(found) == 3
    for index, texts in enumerate(found):
        with posterior.sampled(model, sample_generator(2, index)):
            assert torch.equal(texts, model.generate(**PROMPTS, max_new_tokens=6))
    assert len({str(texts.tolist()) for texts in found}) > 1
    at_mean = sample_generations(model, None, PROMPTS, num_samples=0, max_new_tokens=6)
    assert torch.equal(at_mean[0], model.generate(**PROMPTS, max_new_tokens=6))


def test_an_encoder_decoder_with_a_generate_of_its_own_is_for_minimum_bayes_risk():
    """Whisper generates segment after segment, and would read one segment's keys and values in the next."""
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    model = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=tiny.VOCABULARY, d_model=16, **layers, **special)
    ).eval()
    posterior = tiny.posterior_of(model)
    with pytest.raises(ValueError, match="got the encoder-decoder WhisperForConditionalGeneration, which has one of"):
        posterior_generate(model, posterior, {"input_features": torch.zeros(1, 80, 3000)}, num_samples=2)


def test_other_kinds_of_memory_need_the_whole_text():
    """A state-space model keeps no keys and values: sharing its state, weight samples would read each other's."""
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()
    posterior = tiny.posterior_of(model, std=1e-12)
    prompt = {"input_ids": PROMPTS["input_ids"][:1]}
    with pytest.raises(ValueError, match="`use_cache` must be False for MambaForCausalLM"):
        posterior_generate(model, posterior, prompt, num_samples=2)
    found = posterior_generate(model, posterior, prompt, num_samples=2, use_cache=False, max_new_tokens=4)
    assert torch.equal(found, model.generate(**prompt, max_new_tokens=4))


def test_what_cannot_be_averaged_is_named():
    """Ignored, these arguments would give tokens of one weight sample for those of all."""
    model = gpt2()
    posterior = tiny.posterior_of(model)
    for name in ("assistant_model", "encoder_outputs", "past_key_values", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"`{name}` must be left out where several weight samples"):
            posterior_generate(model, posterior, PROMPTS, num_samples=2, **{name: True})
        with pytest.raises(ValueError, match=f"`{name}` must be left out where several weight samples"):
            posterior_generate(model, posterior, {**PROMPTS, name: True}, num_samples=2)
    allowed = {"output_hidden_states": False, "past_key_values": None, "guidance_scale": 1.0}
    posterior_generate(model, posterior, PROMPTS, num_samples=2, max_new_tokens=2, **allowed)
    with pytest.raises(ValueError, match="`posterior` must be given for 2 weight samples"):
        posterior_generate(model, None, PROMPTS, num_samples=2)
    with pytest.raises(ValueError, match="must belong to the model"):
        posterior_generate(model, tiny.posterior_of(llama()), PROMPTS, num_samples=2)
    with pytest.raises(ValueError, match="must be able to generate, got BertForSequenceClassification"):
        posterior_generate(tiny.bert(), None, PROMPTS, num_samples=0)


ASKED = {
    "assistant_early_exit": 1,
    "cache_implementation": "static",
    "guidance_scale": 1.5,
    "output_attentions": True,
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize("name", ASKED)
def test_a_configuration_cannot_ask_for_more_than_an_argument(name):
    """Prompt lookup in a configuration gave another text, without a word; others failed in Transformers' own words."""
    model = llama()
    posterior = tiny.posterior_of(model, std=0.3)
    refused = f"`{name}` must be left out where several weight samples generate together, also of a generation"
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, **{name: ASKED[name]})
    for settings in ({"generation_config": config}, {name: ASKED[name]}):
        with pytest.raises(ValueError, match=refused):
            posterior_generate(model, posterior, PROMPTS, num_samples=2, **settings)
    settings = {"num_samples": 2, "max_new_tokens": 6}
    expected = posterior_generate(model, posterior, PROMPTS, **settings)
    setattr(model.generation_config, name, ASKED[name])
    if name == "cache_implementation":  # which cache the model likes best
        assert torch.equal(posterior_generate(model, posterior, PROMPTS, **settings), expected)
        assert model.generation_config.cache_implementation == "static"
        return
    for more in ({}, {"generation_config": GenerationConfig(max_new_tokens=4)}):
        with pytest.raises(ValueError, match=refused):
            posterior_generate(model, posterior, PROMPTS, num_samples=2, **more)


def test_a_configuration_is_as_good_as_arguments(monkeypatch):
    """The whole of `generate`'s settings may come as one object; Transformers will not take both for long."""
    said = []
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", said.append)
    model = llama()
    posterior = tiny.posterior_of(model, std=0.3)
    settings = {"max_new_tokens": 6, "num_beams": 2, "pad_token_id": 0}
    expected = posterior_generate(model, posterior, PROMPTS, num_samples=2, **settings)
    for more in ({}, {"use_cache": False}):
        config = GenerationConfig(**settings, **more)
        found = posterior_generate(model, posterior, PROMPTS, num_samples=2, generation_config=config)
        assert torch.equal(found, expected)
    assert not [text for text in said if "generation-related arguments" in text]


def test_least_risk_by_hand():
    """Three weight samples, u = 1 for equal texts and 0.5 for equal first words: every sum is small enough to see."""

    def utility(a, b):
        return 1.0 if a == b else 0.5 if a.split()[0] == b.split()[0] else 0.0

    said = [["the dog", "a cat"], ["the cow", "a cat"], ["the pig", "the pig"]]
    pooled = minimum_bayes_risk(said, utility)
    assert pooled.utilities == pytest.approx({
        "the dog": 2.5 / 6,
        "a cat": 2 / 6,
        "the cow": 2.5 / 6,
        "the pig": 3 / 6,
    })
    assert pooled.text == "the pig"
    assert pooled.utility == pytest.approx(0.5)
    apart = minimum_bayes_risk([*said, ["a cat", "the end"]], utility, pooled=False)
    assert apart.utilities == pytest.approx({
        "the dog": 0.5,
        "a cat": 1.5,
        "the cow": 0.5,
        "the pig": 1,
        "the end": 0.5,
    })
    assert apart.text == "a cat"


def test_the_first_of_equals_is_chosen():
    """A choice that hangs on the order in memory would differ from run to run."""
    assert minimum_bayes_risk([["b"], ["a"]]).text == "b"
    assert minimum_bayes_risk([["only"]]).utilities == {"only": 1.0}
    assert unigram_f1("", "") == 1.0
    assert unigram_f1("a", "b") == 0.0
    assert unigram_f1("a a b", "a c") == pytest.approx(2 * 1 / 5)
    with pytest.raises(ValueError, match=r"at least one text for each weight sample, got \[1, 0\]"):
        minimum_bayes_risk([["a"], []])
