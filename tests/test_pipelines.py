"""Pipelines that average: Transformers' own results in the limit, averages by hand, abstention, the way back."""

import math
import threading

import numpy as np
import pytest
import torch
import transformers

from hf_ivon.draws import sample_generator
from hf_ivon.mixture import Mixture
from hf_ivon.pipelines import pipeline
from tests import tiny

TEXTS = ["the film was good", "a tea is very cold", "bad", "alice went to rome", "the tea"]
LONG = "alice went to rome and bob is not in rome"


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def classifier(**config):
    return tiny.bert(**config).eval()


def texts(model=None, posterior=None, **settings):
    """A pipeline of ours over texts; by default with a wide posterior."""
    model = classifier() if model is None else model
    posterior = tiny.posterior_of(model, std=0.5) if posterior is None else posterior
    return pipeline(
        "text-classification", model, posterior=posterior, tokenizer=tiny.tokenizer(), device="cpu", **settings
    )


def tagger():
    labels = dict(enumerate(["O", "B-PER", "I-PER", "LOC"]))
    return tiny.tagger(id2label=labels, label2id={v: k for k, v in labels.items()})


def tags(model, **settings):
    return pipeline("ner", model, tokenizer=tiny.tokenizer(), device="cpu", **settings)


def plain(task, model, **settings):
    return transformers.pipeline(task, model=model, tokenizer=tiny.tokenizer(), device="cpu", **settings)


def without(results):
    """Results without what ours have more."""
    if isinstance(results, list):
        return [without(r) for r in results]
    return {k: v for k, v in results.items() if k not in ("entropy", "mutual_information", "variance", "abstained")}


def draws(model, posterior, num_samples, seed, text, function):
    """Scores of one text at each weight sample, (samples, classes)."""
    rows = []
    for index in range(num_samples):
        with posterior.sampled(model, sample_generator(seed, index)), torch.no_grad():
            rows.append(function(model(**tiny.tokenizer()(text, return_tensors="pt")).logits[0].double()))
    return torch.stack(rows)


CALLS = [
    ("text-classification", TEXTS[0], {}),
    ("text-classification", TEXTS, {}),
    ("text-classification", TEXTS, {"batch_size": 2, "top_k": None}),
    ("text-classification", TEXTS, {"top_k": 2, "function_to_apply": "sigmoid"}),
    ("text-classification", TEXTS[0], {"top_k": 1, "function_to_apply": "none"}),
    ("text-classification", {"text": "the film", "text_pair": "was good"}, {}),
    ("token-classification", TEXTS[3], {}),
    ("token-classification", TEXTS, {"batch_size": 2, "ignore_labels": []}),
    ("token-classification", TEXTS, {"aggregation_strategy": "simple"}),
    ("token-classification", "alices colder teas", {"aggregation_strategy": "average", "ignore_labels": []}),
    ("token-classification", [LONG, *TEXTS], {"aggregation_strategy": "simple", "stride": 2, "batch_size": 3}),
    ("token-classification", [["alice", "went"]], {"is_split_into_words": True, "aggregation_strategy": "first"}),
]


@pytest.mark.parametrize(("task", "inputs", "options"), CALLS)
def test_without_samples_it_is_the_pipeline_of_transformers(task, inputs, options):
    """Whoever changes an import must not have to change anything else: formats, order and scores to the last bit."""
    model = classifier() if task == "text-classification" else tagger()
    options = dict(options)
    batch_size = options.pop("batch_size", 1)
    expected = plain(task, model)(inputs, batch_size=batch_size, **options)
    ours = pipeline(task, model, num_samples=0, tokenizer=tiny.tokenizer(), device="cpu")
    found = ours(inputs, batch_size=batch_size, **options)
    assert without(found) == expected
    assert str(found).count("'score'") == str(expected).count("'score'") > 0


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_and_uncertainties_are_those_of_the_draws(batch_size):
    """Averaged logits, another draw for each batch, or padding that is counted would all give other numbers."""
    model = classifier()
    posterior, before = tiny.posterior_of(model, std=0.5), weights_of(model)
    found = texts(model, posterior, num_samples=4, seed=3, top_k=None)(TEXTS, batch_size=batch_size)
    for text, rows in zip(TEXTS, found, strict=True):
        p = draws(model, posterior, 4, 3, text, lambda x: x.softmax(-1))
        mean = p.mean(0)
        entropy = -(mean * mean.log()).sum()
        expected_entropy = -(p * p.log()).sum(-1).mean()
        assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)
        for row in rows:
            assert row["score"] == pytest.approx(mean[int(row["label"][-1])].item(), abs=1e-6)
            assert row["entropy"] == pytest.approx(entropy.item(), abs=1e-6)
            assert row["mutual_information"] == pytest.approx((entropy - expected_entropy).item(), abs=1e-6)
    assert unchanged(model, before)


def test_samples_are_drawn_once_a_call():
    """A draw for each example would cost more than its forward pass; a data set takes one round for many batches."""

    class Counted:
        calls = 0

        def __init__(self, posterior):
            self.posterior = posterior

        def sampled(self, *args, **kwargs):
            Counted.calls += 1
            return self.posterior.sampled(*args, **kwargs)

    model = classifier()
    pipe = texts(model, Counted(tiny.posterior_of(model)), num_samples=3)
    expected = pipe(TEXTS)
    assert Counted.calls == 3
    assert list(pipe(text for text in TEXTS)) == expected
    assert Counted.calls == 6


def test_streams_come_in_windows_and_the_model_is_at_its_mean_in_between(monkeypatch):
    """A generator may be endless, and whoever reads it may use the model for something else."""
    monkeypatch.setattr("hf_ivon.pipelines._WINDOW", 2)
    model = classifier()
    before, pipe, read = weights_of(model), texts(model, num_samples=2), []

    def endless():
        while True:
            read.append(1)
            yield TEXTS[len(read) % 5]

    stream = pipe(endless())
    first = next(iter(stream))
    assert len(read) <= 4
    assert unchanged(model, before)
    assert first == pipe(TEXTS[1])[0]


def test_images_are_averaged():
    """The same for the pipeline of images, whose scores keep all digits."""
    image = pytest.importorskip("PIL.Image")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    pixels = np.random.default_rng(0).integers(0, 255, (3, 10, 10, 3), dtype=np.uint8)
    pictures = [image.fromarray(p) for p in pixels]
    posterior = tiny.posterior_of(model, std=0.5)
    settings = {"image_processor": processor, "device": "cpu"}
    own = transformers.pipeline("image-classification", model=model, **settings)
    at_mean = pipeline("image-classification", model, num_samples=0, **settings)
    assert without(at_mean(pictures, batch_size=2)) == own(pictures, batch_size=2)
    found = pipeline("image-classification", model, posterior=posterior, num_samples=3, **settings)(pictures)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for index in range(3):
        with posterior.sampled(model, sample_generator(0, index)), torch.no_grad():
            total += model(**processor(images=pictures, return_tensors="pt")).logits.double().softmax(-1) / 3
    for rows, expected in zip(found, total, strict=True):
        for row in rows:
            assert row["score"] == pytest.approx(expected[int(row["label"][-1])].item(), abs=1e-6)


def test_each_label_of_many_has_its_own_uncertainty():
    """A text may surely be about one thing and perhaps about another; one number for both would tell neither."""
    model = classifier(problem_type="multi_label_classification")
    posterior = tiny.posterior_of(model, std=0.5)
    pipe = texts(model, posterior, num_samples=4)
    p = draws(model, posterior, 4, 0, TEXTS[0], torch.sigmoid).mean(0)
    rows = {r["label"]: r for r in pipe(TEXTS[0], top_k=None)}
    for i in range(3):
        row, q = rows[f"LABEL_{i}"], p[i].item()
        assert row["score"] == pytest.approx(q, abs=1e-6)
        assert row["entropy"] == pytest.approx(-q * math.log(q) - (1 - q) * math.log(1 - q), abs=1e-6)
    threshold = sorted(r["entropy"] for r in rows.values())[1]
    pipe.abstain_above = threshold
    assert sorted(r["abstained"] for r in pipe(TEXTS[0], top_k=None)) == [False, False, True]


def test_a_regression_has_a_variance():
    """Numbers have no entropy; how far the weight samples are apart is what can be said of them."""
    model = classifier(num_labels=1, problem_type="regression")
    posterior = tiny.posterior_of(model, std=0.5)
    values = draws(model, posterior, 5, 0, TEXTS[0], lambda x: x)
    pipe = texts(
        model, posterior, num_samples=5, abstain_by="variance", abstain_above=values.var(unbiased=False) + 1e-3
    )
    row = pipe(TEXTS[0])[0]
    assert row["score"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert row["variance"] == pytest.approx(values.var(unbiased=False).item(), abs=1e-5)
    assert row["abstained"] is False
    pipe.abstain_by = "entropy"
    with pytest.raises(ValueError, match="`abstain_by` must be one of variance for scores by the function 'none'"):
        pipe(TEXTS[0])


def test_abstention_is_strictly_above_the_threshold():
    """The label is gone, so that nobody who overlooks `abstained` acts on it; the score shows what there was."""
    pipe = texts(num_samples=4)
    sure = pipe(TEXTS)
    assert all("abstained" not in row for row in sure)
    for measure in ("entropy", "mutual_information"):
        pipe.abstain_by = measure
        for threshold in sorted(row[measure] for row in sure):
            pipe.abstain_above = threshold
            for row, before in zip(pipe(TEXTS), sure, strict=True):
                assert row["abstained"] == (before[measure] > threshold)
                assert row["score"] == before["score"]
                assert row["label"] == (None if row["abstained"] else before["label"])
                assert row.get("withheld") == (before["label"] if row["abstained"] else None)


def test_scores_that_are_not_numbers_are_abstained_from():
    """A comparison with NaN is false: the least certain model of all would never abstain."""
    model = classifier()
    posterior = tiny.posterior_of(model)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    assert texts(model, posterior, num_samples=2, abstain_above=10.0)("bad")[0]["label"] is None


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_entities_have_the_uncertainty_of_their_least_certain_token(strategy):
    """An entity that is sure of its first token only is not sure; each token's own numbers are those of the draws."""
    model = tagger()
    posterior = tiny.posterior_of(model, std=0.5)
    text = "alices tea colder"
    pipe = tags(model, posterior=posterior, num_samples=3, ignore_labels=[])
    found = pipe(text, aggregation_strategy=strategy)
    encoded = tiny.tokenizer()(text, return_offsets_mapping=True, return_tensors="pt")
    spans = encoded.pop("offset_mapping")[0].tolist()
    total = 0
    for index in range(3):
        with posterior.sampled(model, sample_generator(0, index)), torch.no_grad():
            total = total + model(**encoded).logits[0].double().softmax(-1) / 3
    entropy = torch.special.entr(total).sum(-1).tolist()
    assert len(found) == 5 if strategy == "none" else 0 < len(found) < 5
    for entity in found:
        inside = [e for (a, b), e in zip(spans, entropy, strict=True) if entity["start"] <= a < b <= entity["end"]]
        assert entity["entropy"] == pytest.approx(max(inside), abs=1e-6)
        if strategy == "none":
            assert entity["score"] == pytest.approx(total[entity["index"]].max().item(), abs=1e-6)
    pipe.abstain_above = sorted(e["entropy"] for e in found)[0]
    key = "entity" if strategy == "none" else "entity_group"
    judged = pipe(text, aggregation_strategy=strategy)
    assert [e[key] for e in judged].count(None) == len(found) - 1


def test_a_mixture_may_stand_for_the_posterior():
    """A deep ensemble behind one service: each member counts once."""
    members = [tiny.bert(seed=s).eval() for s in (1, 2)]
    mixture = Mixture([weights_of(m) for m in members], [None, None])
    pipe = texts(classifier(seed=5), mixture, num_samples=2)
    alone = [{r["label"]: r["score"] for r in plain("text-classification", m)(TEXTS[0], top_k=None)} for m in members]
    expected = {label: (alone[0][label] + alone[1][label]) / 2 for label in alone[0]}
    assert {r["label"]: r["score"] for r in pipe(TEXTS[0], top_k=None)} == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_is_opened_with_its_posterior(tmp_path):
    """A directory is all that a service is given: model, tokenizer and posterior are there."""
    model = classifier()
    posterior = tiny.posterior_of(model, std=0.5)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"posterior_config.json is missing"):
        pipeline("text-classification", tmp_path)
    posterior.save_pretrained(tmp_path)
    pipe = pipeline("sentiment-analysis", tmp_path, num_samples=3, device="cpu")
    assert pipe(TEXTS) == texts(model, posterior, num_samples=3)(TEXTS)
    for name in ("dtype", "torch_dtype"):
        half = pipeline("text-classification", str(tmp_path), num_samples=3, device="cpu", **{name: torch.bfloat16})
        assert half.model.dtype == torch.bfloat16
        assert half("bad")[0]["score"] == pytest.approx(pipe("bad")[0]["score"], abs=0.1)
    with torch.no_grad():
        model.classifier.bias += 1.0
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be used"):
        pipeline("text-classification", tmp_path)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_an_adapters_directory_is_opened_with_its_posterior(tmp_path, task):
    """Transformers loads adapters in a way that renames their weights, and the posterior would fit none of them."""
    peft = pytest.importorskip("peft")
    base, kind = (classifier(), "SEQ_CLS") if task == "text-classification" else (tiny.tagger(), "TOKEN_CLS")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type=kind)).eval()
    posterior = tiny.posterior_of(model, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    posterior.save_pretrained(tmp_path / "adapter")
    found = pipeline(task, tmp_path / "adapter", num_samples=2, device="cpu")(TEXTS)
    loaded = pipeline(task, model, posterior=posterior, num_samples=2, tokenizer=tiny.tokenizer(), device="cpu")
    assert found == loaded(TEXTS)
    same = pipeline(task, tmp_path / "adapter", num_samples=2, device="cpu", dtype="auto", model_kwargs={})
    assert found == same(TEXTS)
    for name, value in {"dtype": torch.bfloat16, "torch_dtype": "float16", "model_kwargs": {"cache_dir": "x"}}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be left out for an adapter's directory, got "):
            pipeline(task, tmp_path / "adapter", **{name: value})


def test_an_interrupt_leaves_the_mean_and_the_modes(monkeypatch):
    """A service that fails in the middle of a request must answer the next one from the mean."""
    model = classifier().train()
    before, pipe, calls = weights_of(model), texts(model, num_samples=3), []
    expected = pipe(TEXTS)

    def fail(*args, **kwargs):
        calls.append(not unchanged(model, before))
        if len(calls) == 7:
            raise KeyboardInterrupt
        return type(pipe)._forward(pipe, *args, **kwargs)

    monkeypatch.setattr(pipe, "_forward", fail)
    with pytest.raises(KeyboardInterrupt):
        pipe(TEXTS)
    assert all(calls)
    assert unchanged(model, before)
    assert model.training
    monkeypatch.undo()
    assert pipe(TEXTS) == expected


def test_threads_take_turns():
    """Two requests at a time would be answered with each other's weights, and leave one of them in the model."""
    model = classifier()
    before, pipe = weights_of(model), texts(model, num_samples=3)
    expected, found = [pipe(text) for text in TEXTS], {}

    def request(i):
        found[i] = pipe(TEXTS[i])

    threads = [threading.Thread(target=request, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(5)] == expected
    assert unchanged(model, before)


def test_what_does_not_fit_is_named():
    """Settings that cannot work must say so before the first request."""
    with pytest.raises(ValueError, match="`task` must be one of image-classification, ner.*got 'fill-mask'"):
        pipeline("fill-mask", classifier())
    with pytest.raises(ValueError, match="`posterior` must be given with a model that is loaded"):
        pipeline("text-classification", classifier())
    with pytest.raises(ValueError, match="`num_samples` must be an integer of at least 0, got -1"):
        texts(num_samples=-1)
    with pytest.raises(ValueError, match="`abstain_by` must be one of entropy, mutual_information, var.*got 'std'"):
        texts(abstain_by="std")
    with pytest.raises(ValueError, match="`abstain_above` must be a number of at least 0, got -1"):
        texts(abstain_above=-1)
    with pytest.raises(ValueError, match="must be at least 2 to abstain by 'mutual_information', got 0"):
        texts(num_samples=0, abstain_above=1.0, abstain_by="mutual_information")
    pipe = texts(posterior=tiny.posterior_of(tiny.bert(num_labels=5)))
    with pytest.raises(ValueError, match="must belong to the model"):
        pipe("bad")
