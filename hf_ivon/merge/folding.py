"""Adapters folded into their base: its weights with the differences added, and a configuration that fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_ivon.json_files import write_json
from hf_ivon.merge.adapters import CONFIG, PREFIX, Product, products, whole_tensors, wide_dtype
from hf_ivon.merge.files import Checkpoint, Writer
from hf_ivon.tensor_files import Entry

_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EMBEDDINGS = ("embed_tokens", "lm_head")  # which PEFT saves as a whole if they were resized, or have an adapter
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


def own_base(models: Sequence[Checkpoint], problems: list[str]) -> str:
    """Return the base model that adapters name, with its revision behind "@" if they name one.

    Args:
        models: The adapters.
        problems: Where to say that they do not name one.
    """
    configs = [m.json(CONFIG) for m in models]
    named = [(c.get("base_model_name_or_path"), c.get("revision") or "main") for c in configs]
    name, revision = named[0]
    if not name or len(set(named)) > 1:
        problems.append("the adapters do not name one base model and revision to fold into: name it by --base-model")
    return str(name) if revision == "main" or Path(str(name)).is_dir() else f"{name}@{revision}"


def fold_problems(base: Checkpoint, adapter: Checkpoint) -> list[str]:
    """Return why an adapter cannot be folded into a base model, one string a problem."""
    prefix, changes, whole = _parts(base, adapter)
    known = {prefix + name: entry for name, entry in base.tensors.entries.items()}
    saved = [*_EMBEDDINGS, *(adapter.json(CONFIG).get("modules_to_save") or ())]
    for name in sorted(whole.keys() - known.keys()):
        if not any(f"{module}." in name for module in saved):
            return [f"{adapter.name} has `{name}`, which is no weight of {base.name}: it cannot be folded"]
    entries = known | {name: adapter.tensors.entries[own] for name, own in whole.items()}
    squares, mixed = [], False
    for name, product in sorted(changes.items()):
        if name not in entries:
            return [
                f"the base model {base.name} lacks `{name}`, which the adapter changes: name its own by --base-model"
            ]
        shape, entry = _shape(adapter, product), entries[name]
        if entry.dtype not in _REAL:
            return [f"`{name}` of {base.name} is quantized: name the base model that it was made of by --base-model"]
        if shape not in (entry.shape, _transposed(entry.shape)):
            return [
                f"`{name}` has shape {entry.shape} in {base.name}, and the adapter's change of it {shape}: name the "
                f"adapter's own base by --base-model"
            ]
        squares += [name] if shape == _transposed(shape) else []
        # PEFT's configuration says of several kinds of layers what holds for the last one.
        mixed |= shape != _transposed(shape) and (shape != entry.shape) != _is_flipped(adapter, product)
    if mixed and squares:
        return [
            f"`fan_in_fan_out` of {adapter.name} does not hold for all its layers, and does not tell whether "
            f"`{squares[0]}` is transposed: fold it by PEFT's `merge_and_unload`"
        ]
    return []


def fold(
    base: Checkpoint,
    adapter: Checkpoint,
    directory: Path,
    max_shard_size: int | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the base model with an adapter's differences added to its weights, and its configuration.

    Args:
        base: The base model.
        adapter: A LoRA adapter of it, without `fold_problems`.
        directory: Where to.
        max_shard_size: Largest file, in bytes or like "5GB".
        dtype: Of the result; the base's by default.

    Raises:
        ValueError: If the result of a change holds NaN or inf.
    """
    prefix, changes, whole = _parts(base, adapter)
    known = {prefix + name: entry for name, entry in base.tensors.entries.items()}
    entries = known | {name: adapter.tensors.entries[own] for name, own in whole.items()}
    usual = next((known[name].dtype for name in changes if name in known), None)  # for weights that the base lacks
    layout = {}
    for name in sorted(entries):
        own = entries[name].dtype
        default = known[name].dtype if name in known else usual or own
        layout[name] = ((dtype or default) if own in _REAL else own, entries[name].shape)
    wide = wide_dtype([base, adapter])
    with Writer(directory, "model", layout, {"format": "pt"}, max_shard_size) as writer:
        for name, (wanted, _) in layout.items():
            weight = adapter.tensors[whole[name]] if name in whole else base.tensors[name.removeprefix(prefix)]
            if name in changes:
                weight = weight.to(wide) + _change(adapter, changes[name], weight.shape, wide)
            weight = weight.to(wanted)
            if name in changes and not weight.isfinite().all():
                raise ValueError(
                    f"`{name}` of {base.name} holds NaN or inf, or with the change is too large for {wanted}. Check "
                    f"that model, or choose another --dtype."
                )
            writer.write(name, weight)
    _write_model_config(base, adapter, known, layout, directory)


def _parts(base: Checkpoint, adapter: Checkpoint) -> tuple[str, dict[str, Product], dict[str, str]]:
    """Return what the base's names lack in front, the changes by weight, and the adapter's names of whole tensors."""
    changes = {f"{module}.weight": product for module, product in products(adapter).items()}
    names = whole_tensors(adapter.tensors.entries)
    # The weights that changes are added to, where PEFT saves them too.
    whole = {name.removeprefix(PREFIX).replace(".base_layer.", "."): name for name in names}
    missing = [name for name in changes if name not in base.tensors]
    # An encoder saved alone lacks the "bert." of a classifier's names.
    prefix = next((name.partition(".")[0] + "." for name in missing if name.partition(".")[2] in base.tensors), "")
    return prefix, changes, whole


def _shape(adapter: Checkpoint, product: Product) -> tuple[int, ...]:
    down, up = (adapter.tensors.entries[name].shape for name in product.names)
    return (up[0], *down[1:])


def _change(adapter: Checkpoint, product: Product, shape: tuple[int, ...], wide: torch.dtype) -> Tensor:
    down, up = (adapter.tensors[name].to(wide).flatten(1) for name in product.names)
    change = (product.scale * (up @ down)).reshape(_shape(adapter, product))
    square = shape == _transposed(shape)
    return change.T if (_is_flipped(adapter, product) if square else change.shape != shape) else change


def _is_flipped(adapter: Checkpoint, product: Product) -> bool:
    """Tell whether a weight is the transpose of what a linear layer has, where its shape does not say so."""
    return ".lora_embedding_" in product.names[0] or bool(adapter.json(CONFIG).get("fan_in_fan_out"))


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return shape[::-1] if len(shape) == 2 else None


def _write_model_config(
    base: Checkpoint,
    adapter: Checkpoint,
    known: Mapping[str, Entry],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    directory: Path,
) -> None:
    """Write the base's configuration, for the class that the adapter's task needs, and the sizes it has now."""
    from transformers.models.auto import modeling_auto

    config, task = base.json("config.json"), adapter.json(CONFIG).get("task_type")
    names: Mapping[str, str] = {
        "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }.get(task or "", {})
    if config.get("model_type") in names:
        config["architectures"] = [names[config["model_type"]]]
    heads = [layout[name][1][0] for name in _HEADS if name in layout]
    if heads and task in ("SEQ_CLS", "TOKEN_CLS") and len(config.get("id2label", {0: "", 1: ""})) != heads[0]:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(heads[0])}
        config["label2id"] = {f"LABEL_{i}": i for i in range(heads[0])}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, entry in known.items():
            rows = layout[name][1][:1]
            if rows != entry.shape[:1] == (part.get("vocab_size"),):
                part["vocab_size"] = rows[0]
    write_json(directory / "config.json", config)
