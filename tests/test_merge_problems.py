"""What is wrong with the models or settings of a merge is said before it begins, all of it, without a traceback."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from hf_ivon.merge import files, merge
from hf_ivon.merge.plan import make_plan
from tests import tiny
from tests.test_merge import models, save, tensors
from tests.test_merge_matching import sentence_encoder

__all__ = ["models"]


def message_of(*args, **kwargs):
    """Return what a plan's error says."""
    with pytest.raises(ValueError, match="The models cannot be merged: ") as caught:
        make_plan(*args, **kwargs)
    return str(caught.value)


def change(directory, **values):
    """Replace tensors of a model."""
    file = directory / "model.safetensors"
    save_file({**load_file(file), **values}, file, {"format": "pt"})


BROKEN = {
    "missing": "is neither a directory nor can it be downloaded",
    "hub": "me/none is neither a directory nor can it be downloaded",
    "empty": "model.safetensors is missing",
    "file": "is neither a directory nor can it be downloaded",
    "truncated": "model.safetensors is truncated",
    "adapter": "adapter_model.safetensors is missing",
    "no tensors": "model.safetensors holds no tensors",
}


def broken(directory, kind):
    """Make a model that cannot be opened, and return its name."""
    place = directory / "broken"
    if kind == "hub":
        return "me/none"
    if kind == "file":
        place.write_text("")
    elif kind != "missing":
        place.mkdir()
    if kind == "truncated":
        (place / "model.safetensors").write_bytes((directory / "a" / "model.safetensors").read_bytes()[:200])
    elif kind == "adapter":
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    elif kind == "no tensors":
        save_file({}, place / "model.safetensors", {"format": "pt"})
    return str(place)


@pytest.mark.parametrize("heads", [None, "drop", "separate"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_first_model_that_cannot_be_opened_is_named(models, kind, heads):
    """The name of the first model was mistyped: a KeyError about a tensor of the second did not say so."""
    directory, names, _ = models
    (directory / "b" / "posterior_config.json").unlink()
    first = broken(directory, kind)
    for order in ([first, *names], [*names, first], [first]):
        for base in (None, str(directory / "base")):
            message = message_of(order, base, method="task-arithmetic", heads=heads)
            assert BROKEN[kind] in message
            assert ("posterior_config.json is missing" in message) == (len(order) > 1)
            assert "not in the base" not in message
            assert "in one shape" not in message


@pytest.mark.parametrize("kind", BROKEN)
def test_a_base_that_cannot_be_opened_is_the_only_problem(models, kind):
    """All tensors of the models were "not in the base", with advice to drop them."""
    directory, names, _ = models
    message = message_of(names, broken(directory, kind), method="task-arithmetic")
    assert BROKEN[kind] in message
    assert "--heads" not in message
    assert "in one shape" not in message_of(names, broken(directory / "a", "hub"), method="ties", heads="keep:a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("where", ["b", "c", "base"])
def test_quantized_weights_are_no_weights(models, where, dtype):
    """Of a model in 8 bits the numbers without their scales were averaged with the weights of the others."""
    directory, names, _ = models
    name = "bert.encoder.layer.0.output.dense.weight"
    change(directory / where, **{name: tensors(directory / "a")[name].to(dtype)})
    said = str(dtype).removeprefix("torch.")
    message = message_of(names, str(directory / "base"), method="task-arithmetic")
    assert f"`{name}` is {said} in {directory}/{where} and float32 in {directory}/a: if it is quantized" in message
    if where == "base":  # which this rule does not compute with
        merge(names, directory / "out", base_model=directory / "base", method="average")


def test_a_quantized_base_is_named_by_its_own_names(models):
    """An encoder saved alone has other names: looked up under the models', its weights in 8 bits went unseen."""
    directory, names, _ = models
    own = {name.removeprefix("bert."): value for name, value in tensors(directory / "base").items()}
    name = "encoder.layer.0.output.dense.weight"
    file = directory / "base" / "model.safetensors"
    save_file({**own, name: own[name].to(torch.int8)}, file, {"format": "pt"})
    message = message_of(names, str(directory / "base"), method="task-arithmetic")
    assert f"`{name}` is int8 in {directory}/base and float32 in {directory}/a: if it is quantized" in message


def test_whole_numbers_are_not_compared_with_the_base(models):
    """Numbers of positions are the models' own, and the rule asks the base for none."""
    directory, names, _ = models
    for name, dtype in (("a", torch.int64), ("b", torch.int64), ("c", torch.int64), ("base", torch.float32)):
        change(directory / name, **{"bert.positions": torch.arange(3, dtype=dtype)})
    merge(names, directory / "out", base_model=directory / "base", method="task-arithmetic")
    assert tensors(directory / "out")["bert.positions"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("path", ["../other", "/etc", "1_Pooling/../../other"])
def test_modules_of_another_place_are_refused(tmp_path, path):
    """A repository could have any directory of the user's copied into the merge, and then be uploaded with it."""
    sentence_encoder(tmp_path / "a", 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret").write_text("")
    modules = json.loads((tmp_path / "a" / "modules.json").read_text())
    (tmp_path / "a" / "modules.json").write_text(json.dumps([*modules, {"path": path}]))
    with pytest.raises(ValueError, match=r"modules\.json (names|cannot be read, or names no directories)"):
        merge([tmp_path / "a"], tmp_path / "out", method="average")


def test_nested_modules_keep_their_places(tmp_path):
    """A SentenceTransformer would not find how to pool."""
    for name, seed in (("a", 1), ("b", 2)):
        sentence_encoder(tmp_path / name, seed)
        (tmp_path / name / "sub").mkdir()
        shutil.move(tmp_path / name / "1_Pooling", tmp_path / name / "sub" / "1_Pooling")
        modules = [{"path": ""}, {"path": "sub/1_Pooling"}]
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="average")
    assert (tmp_path / "out" / "sub" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "out" / "1_Pooling").exists()


def test_separate_heads_need_configurations(models):
    """The merge ran to its end, and was then lost for a file that had not been there from the beginning."""
    directory, names, _ = models
    save(tiny.bert(num_labels=5), directory / "five", 10, torch.Generator().manual_seed(1))
    (directory / "five" / "config.json").unlink()
    message = message_of([names[0], str(directory / "five")], None, method="average", heads="separate")
    assert f"{directory}/five has no config.json, which --heads separate needs" in message
    merge([names[0], directory / "five"], directory / "out", method="average", heads="drop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1e39, 1.0, 1.0]}, "`weights` must be numbers of at least 0, not all 0, none above 3.4e+38"),
        ({"weights": [1e-60, 0.0, 1e-60]}, "`weights` must be numbers of at least 0, not all 0"),
        ({"base_hessian": 1e39}, "`base_hessian` must be no more than 3.4e+38, got 1e+39"),
    ],
)
def test_numbers_are_those_that_are_computed_with(models, settings, message):
    """They are inf, or 0, in fp32: a merge of NaN was called "too large", or a traceback ended it."""
    directory, names, _ = models
    assert message in message_of(names, str(directory / "base"), method="uncertainty", **settings)


def test_a_model_is_kept_by_its_name_without_the_revision(models, monkeypatch):
    """The revision is typed where the model is named, and nobody repeats it."""
    directory, names, _ = models
    save(tiny.bert(num_labels=5), directory / "five", 10, torch.Generator().manual_seed(1))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(directory / "five"))
    shared = {"method": "average"}
    plan = make_plan([names[0], "me/x@v2"], None, heads="keep:me/x", **shared)
    assert {m.name for m in plan.kept.values()} == {"me/x@v2"}
    message = message_of([names[0], "me/x@v1", "me/x@v2"], None, heads="keep:me/x", **shared)
    assert "names 'me/x', which is any of me/x@v1, me/x@v2: name one" in message
    plan = make_plan([names[0], "me/x@v1", "me/x@v2"], None, heads="keep:me/x@v2", **shared)
    assert {m.name for m in plan.kept.values()} == {"me/x@v2"}


@pytest.mark.parametrize("where", ["a", "b"])
def test_labels_that_are_no_mapping_are_named(models, where):
    """A list of class names, which Transformers does not read either, was a traceback."""
    directory, names, _ = models
    file = directory / where / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": ["good", "bad", "neither"]}))
    message = message_of(names, None, method="average")
    assert f"`id2label` in config.json of {directory}/{where} is no mapping of classes to names" in message


@pytest.mark.parametrize(
    "text", ['{"model": null}', '{"model": []}', '{"model": {"vocab": {"a": 0}}, "added_tokens": null}']
)
def test_a_tokenizer_of_nothing_is_no_traceback(models, text):
    """Some conversions leave such a file behind."""
    directory, names, _ = models
    for name in names:
        (directory / name / "tokenizer.json").write_text(text)
    merge(names, directory / "out", method="average")


def test_all_problems_of_adapters_are_named(tmp_path):
    """A name that was mistyped is no reason to say that the model is no adapter."""
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(target_modules=["query"], r=2))
    save(model, tmp_path / "a", 10, torch.Generator().manual_seed(1))
    message = message_of([str(tmp_path / "none"), str(tmp_path / "a")], None, method="average", adapters="concat")
    assert "none is neither a directory" in message
    assert "is no adapter" not in message


def test_a_model_with_a_header_alone_says_so(tmp_path):
    """An upload of a file without tensors opens, and the next one then has "no tensor in common" with it."""
    BertModel(tiny.bert().config).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    problems = []
    files.Checkpoint.open(str(tmp_path), problems)
    assert problems == [f"{tmp_path}: model.safetensors holds no tensors"]


def test_vocabularies_of_older_models_are_compared(models):
    """Embeddings of other words would be averaged; many models on the Hub have no tokenizer.json."""
    directory, names, _ = models
    for name in "abc":
        (directory / name / "vocab.txt").write_text("[PAD]\nbad\ngood\n")
    make_plan(names, None, method="average")
    (directory / "c" / "vocab.txt").write_text("[PAD]\ngood\nbad\n")
    assert "/a and " in message_of(names, None, method="average")
    assert message_of(names, None, method="average").count("/c differ in vocab.txt: if they are one, copy") == 1
