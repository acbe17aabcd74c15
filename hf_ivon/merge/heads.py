"""Heads that differ between merged models: kept beside the shared weights, and put together with them again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_ivon.merge.files import Checkpoint
from hf_ivon.merge.plan import Plan
from hf_ivon.merge.vocabulary import united_settings
from hf_ivon.tensor_files import TensorFiles

HEADS = "heads"


def write_heads(plan: Plan, work: Path) -> None:
    """Write each model's own tensors into `heads/MODEL`, with the configuration that says what they are."""
    for model in plan.models:
        directory = work / HEADS / model.short_name
        directory.mkdir(parents=True)
        if own := _own(plan, model):
            save_file(own, directory / "model.safetensors", {"format": "pt"})
        shutil.copyfile(model.directory / "config.json", directory / "config.json")


def load_head(directory: str | os.PathLike[str], head: str) -> Any:
    """Load a merge of `heads="separate"` as one of its models: the shared weights with that model's own.

    Args:
        directory: The merge.
        head: Which model: the last part of the name that it was merged by.

    Returns:
        A Transformers model of the class in that model's configuration, in evaluation mode.

    Raises:
        ValueError: If there is no such head, or the merge is incomplete.
    """
    heads = Path(directory) / HEADS
    if not (heads / head / "config.json").is_file():
        known = ", ".join(sorted(p.name for p in heads.iterdir())) if heads.is_dir() else "none"
        raise ValueError(f"`head` must be one of the merge's heads ({known}), got {head!r}.")
    problems: list[str] = []
    state = dict(TensorFiles(Path(directory), "model", problems))
    if problems:
        raise ValueError(f"The merge in {str(directory)!r} is incomplete: {'; '.join(problems)}. Merge again.")
    return _build(heads / head, {**state, **TensorFiles(heads / head, "model", [])})


def build_model(plan: Plan, state: Mapping[str, Tensor], head: str) -> Any:
    """Return a model with merged weights, and with a model's own head if heads are separate.

    Args:
        plan: What was merged.
        state: The merged weights.
        head: A data set's name: with separate heads, that of a model.

    Raises:
        ValueError: If the heads are separate and there is no such model.
    """
    source = source_of(plan, head)
    return _build(source.directory, {**state, **(_own(plan, source) if plan.separate else {})}, source)


def source_of(plan: Plan, name: str) -> Checkpoint:
    """Return the model whose head, classes and configuration a merge is evaluated with.

    Args:
        plan: What is merged.
        name: A data set's name: with separate heads, that of a model.

    Raises:
        ValueError: If the heads are separate and there is no such model.
    """
    if not plan.separate:
        return next(iter(plan.kept.values())) if plan.kept else plan.models[0]
    by_name = {m.short_name: m for m in plan.models}
    if name not in by_name:
        raise ValueError(
            f"With separate heads, data must be named after a model ({', '.join(by_name)}), got {name!r}."
        )
    return by_name[name]


def _own(plan: Plan, model: Checkpoint) -> dict[str, Tensor]:
    return {name: model.tensors[name] for name in plan.dropped if name in model.tensors}


def _build(directory: Path, state: Mapping[str, Tensor], model: Checkpoint | None = None) -> Any:
    import transformers

    from hf_ivon.data import model_class

    config = transformers.AutoConfig.from_pretrained(directory)
    if model is not None:
        for part in (config.get_text_config(), config):
            part.update(united_settings(part.to_dict(), model))
    return model_class(config).from_pretrained(None, config=config, state_dict=dict(state)).eval()
