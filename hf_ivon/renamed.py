"""Tensors out of files whose names are not the loaded model's: read through the model's class, as its weights are."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_ivon.mean import buffer_keys, posterior_keys, unwrap


def tensors_as_loaded(
    directory: Path, model: nn.Module, dtype: torch.dtype | str = "auto"
) -> tuple[dict[str, Tensor], list[str]]:
    """Read a model's directory as `from_pretrained` does, which renames, joins and splits tensors of many models.

    Args:
        directory: A directory with a configuration and `model.safetensors`, or shards.
        model: A Transformers model, whose class reads it; of any other nothing is read.
        dtype: In which dtype; "auto" is that of the directory.

    Returns:
        Parameters and buffers that are in the directory, by the names of the loaded model; and names in the files
        that the class has no use for.
    """
    transformers = sys.modules.get("transformers")  # a model of Transformers cannot exist unless it was imported
    inner = unwrap(model)
    if transformers is None or not isinstance(inner, transformers.PreTrainedModel):
        return {}, []
    if not (directory / "config.json").is_file():
        return {}, []
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng(devices=[]):  # some classes draw their weights before they load them
        loaded, found = type(inner).from_pretrained(directory, dtype=dtype, **options)
    # What was not in the files, or in another shape, is made up.
    made_up = set(found["missing_keys"]) | {name for name, *_ in found["mismatched_keys"]}
    tensors = {**posterior_keys(loaded), **buffer_keys(loaded)}
    return {n: t.detach() for n, t in tensors.items() if n not in made_up}, sorted(found["unexpected_keys"])
