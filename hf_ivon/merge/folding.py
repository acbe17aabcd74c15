"""Adapters folded into their base: its weights with the differences added, and a configuration that fits them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_ivon.merge.adapters import CONFIG, PREFIX, products
from hf_ivon.merge.files import Checkpoint, Writer


def fold(base: Checkpoint, adapter: Checkpoint, directory: Path, max_shard_size: int | str) -> None:
    """Write the base model with an adapter's differences added to its weights, and its configuration.

    Args:
        base: The base model.
        adapter: A LoRA adapter of it.
        directory: Where to.
        max_shard_size: Largest file, in bytes or like "5GB".

    Raises:
        ValueError: If the base lacks a module of the adapter.
    """
    transposed = adapter.json(CONFIG).get("fan_in_fan_out", False)
    changes = {f"{module}.weight": product for module, product in products(adapter).items()}
    low_rank = {name for p in changes.values() for name in p.names}
    whole = {name.removeprefix(PREFIX): name for name in adapter.tensors if name not in low_rank}
    prefix = _prefix(base, list(changes))  # an encoder saved alone lacks the "bert." of a classifier's names
    entries = {prefix + name: e for name, e in base.tensors.entries.items()}
    entries |= {name: adapter.tensors.entries[own] for name, own in whole.items()}
    if lost := sorted(changes.keys() - entries.keys()):
        raise ValueError(
            f"The base model {base.name} lacks `{lost[0]}`, which the adapter changes. Name its own base."
        )
    layout = {name: (entries[name].dtype, entries[name].shape) for name in sorted(entries)}
    with Writer(directory, "model", layout, {"format": "pt"}, max_shard_size) as writer:
        for name, (dtype, _) in layout.items():
            if name in whole:
                writer.write(name, adapter.tensors[whole[name]])
                continue
            weight = base.tensors[name.removeprefix(prefix)]
            if name in changes:
                down, up = (adapter.tensors[n].float() for n in changes[name].names)
                change = changes[name].scale * (up @ down)
                flip = transposed or ".lora_embedding_" in changes[name].names[0]
                weight = (weight.float() + (change.T if flip else change)).to(dtype)
            writer.write(name, weight)
    heads = [
        entries[n].shape[0] for n in whole if n in ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    ]
    _write_model_config(base, adapter.json(CONFIG).get("task_type"), heads, directory)


def _prefix(base: Checkpoint, names: Sequence[str]) -> str:
    missing = [name for name in names if name not in base.tensors]
    return missing[0].partition(".")[0] + "." if missing and missing[0].partition(".")[2] in base.tensors else ""


def _write_model_config(base: Checkpoint, task: str | None, heads: Sequence[int], directory: Path) -> None:
    """Write the base's configuration, for the class that the adapter's task needs."""
    from transformers.models.auto import modeling_auto

    config = base.json("config.json")
    names: Mapping[str, str] = {
        "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }.get(task or "", {})
    if config.get("model_type") in names:
        config["architectures"] = [names[config["model_type"]]]
    if heads and task == "SEQ_CLS" and len(config.get("id2label", {0: "", 1: ""})) != heads[0]:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(heads[0])}
        config["label2id"] = {f"LABEL_{i}": i for i in range(heads[0])}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
