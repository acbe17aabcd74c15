"""Which tensors of several models belong together, and with which of the base; what to do with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hf_ivon.merge.files import Checkpoint
from hf_ivon.tensor_files import Entry

# What old files call a LayerNorm's tensors; Transformers renames them when it loads them.
_RENAMED = {"weight": "gamma", "bias": "beta", "gamma": "weight", "beta": "bias"}
_ADVICE = "if it is quantized, name the model that it was made of, else save both in one dtype"


def compare(models: Sequence[Checkpoint]) -> tuple[list[str], list[str]]:
    """Return the names that all models have in one shape, and the others."""
    common: list[str] = []
    different: list[str] = []
    for name in dict.fromkeys(n for m in models for n in m.tensors.entries):
        entries = [m.tensors.entries.get(name) for m in models]
        alike = all(e is not None and entries[0] is not None and e.shape == entries[0].shape for e in entries)
        (common if alike else different).append(name)
    return common, different


def base_names(entries: Mapping[str, Entry], base: Checkpoint) -> dict[str, str]:
    """Return what the base calls tensors, as far as it has them in the same shape.

    An encoder saved alone has none of the "bert." of a classifier's names, whichever of the two is the base, and old
    files call a LayerNorm's weight and bias "gamma" and "beta".

    Args:
        entries: The models' tensors.
        base: The model that they were finetuned from.
    """
    known = base.tensors.entries
    lacking = {name.partition(".")[0] + "." for name in entries}
    extra = {name.partition(".")[0] + "." for name in known}
    changes = [("", ""), *((p, "") for p in sorted(lacking)), *(("", p) for p in sorted(extra))]
    candidates = []
    for removed, added in changes:
        found = {}
        for name, entry in entries.items():
            if name.startswith(removed):
                wanted = added + name.removeprefix(removed)
                same = (n for n in _variants(wanted) if n in known and known[n].shape == entry.shape)
                if (match := next(same, None)) is not None:
                    found[name] = match
        candidates.append(found)
    return max(candidates, key=len)


def _variants(name: str) -> Iterator[str]:
    yield name
    module, _, last = name.rpartition(".")
    if last in _RENAMED:
        yield f"{module}.{_RENAMED[last]}"


def settle(
    different: list[str],
    lost: list[str],
    heads: str | None,
    models: Sequence[Checkpoint],
    problems: list[str],
    is_whole: bool = True,
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Decide about tensors that cannot be merged.

    Args:
        different: Names that not all models have in one shape.
        lost: Names that all have, but not the base.
        heads: What the user wants: None, "drop", "keep:MODEL" or "separate".
        models: The models.
        problems: Where to say what is wrong.
        is_whole: Whether the tensors of all models and of the base are known.

    Returns:
        Names that are taken from one model, and names that are left out or kept apart.
    """
    if heads == "separate" and len({m.short_name for m in models}) < len(models):
        problems.append("two models have the same last part of their name, and so would their heads: rename one")
    adapters = any(m.is_adapter for m in models)
    if heads == "separate" and adapters:
        problems.append(
            "heads of adapters cannot be kept apart: pass --heads drop or keep:MODEL, or fold each adapter into its "
            "base first (--into-base with one model) and merge the whole models with --heads separate"
        )
    if heads == "separate" and not adapters:
        problems += [
            f"{m.name} has no config.json, which --heads separate needs to build its model: copy it there"
            for m in models
            if m.tensors and not (m.directory / "config.json").is_file()
        ]
    wanted = None
    if heads is not None and heads.startswith("keep:"):
        wanted = _named(heads.removeprefix("keep:"), models, problems)
    elif heads not in (None, "drop", "separate"):
        problems.append(f"`heads` must be 'drop', 'separate' or 'keep:MODEL', got {heads!r}")
    others = [*different, *lost]
    if is_whole and not others and heads is not None and heads != "drop":
        problems.append(
            f"`heads` is {heads!r}, but all models have all tensors in one shape, so that there is no head to tell: "
            f"leave it out to merge them all, or name the --base-model, whose tensors are those to merge"
        )
    if heads is None:
        for names, where in ((different, "all models"), (lost, "the base")):
            if names:
                listed = ", ".join(f"`{n}`" for n in names[:5]) + (" ..." if len(names) > 5 else "")
                apart = "" if adapters else "--heads separate to keep those of each model apart, "
                problems.append(
                    f"{len(names)} tensors are not in {where} in one shape, such as {listed}: pass --heads drop to "
                    f"leave them out, {apart}or --heads keep:MODEL to take them from one"
                )
    kept = {n: wanted for n in others if wanted is not None and n in wanted.tensors.entries}
    return kept, [n for n in others if n not in kept]


def dtype_problems(
    models: Sequence[Checkpoint], names: Sequence[str], base: Checkpoint | None, of_base: Mapping[str, str]
) -> list[str]:
    """Return where a model or the base has other numbers than the first model, one string for each of them.

    Args:
        models: The models.
        names: Tensors that all have.
        base: The model that they were finetuned from, if the rule computes with it.
        of_base: What the base calls tensors.
    """
    problems = []
    for model in [*models[1:], *([base] if base is not None else [])]:
        for name in names:
            first, own = models[0].tensors.entries[name], of_base.get(name, name) if model is base else name
            dtype = model.tensors.entries[own].dtype if own in model.tensors.entries else first.dtype
            # Of whole numbers the base has no part in the merge.
            counts = model is not base or first.dtype.is_floating_point
            if counts and dtype.is_floating_point != first.dtype.is_floating_point:
                first_is = f"{_short(first.dtype)} in {models[0].name}"
                problems.append(f"`{own}` is {_short(dtype)} in {model.name} and {first_is}: {_ADVICE}")
                break
    return problems


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _named(wanted: str, models: Sequence[Checkpoint], problems: list[str]) -> Checkpoint | None:
    """Return the model that the user means: by its name as it was given, by its path, or by the last part of it.

    The revision behind a repository's "@" may be left out.
    """
    exact = [m for m in models if m.name == wanted or os.path.abspath(m.name) == os.path.abspath(wanted)]
    bare = [m for m in models if not Path(m.name).is_dir() and m.name.partition("@")[0] == wanted]
    found = exact or bare or [m for m in models if m.short_name == wanted]
    if not found:
        problems.append(f"`heads` names {wanted!r}, which is none of {', '.join(m.name for m in models)}")
    elif not exact and len(found) > 1:
        problems.append(f"`heads` names {wanted!r}, which is any of {', '.join(m.name for m in found)}: name one")
    return found[0] if found else None
