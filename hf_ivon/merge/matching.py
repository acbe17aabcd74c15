"""Which tensors of several models belong together, and with which of the base; what to do with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from hf_ivon.merge.files import Checkpoint
from hf_ivon.tensor_files import Entry

# What old files call a LayerNorm's tensors; Transformers renames them when it loads them.
_RENAMED = {"weight": "gamma", "bias": "beta", "gamma": "weight", "beta": "bias"}


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
    different: list[str], lost: list[str], heads: str | None, models: Sequence[Checkpoint], problems: list[str]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Decide about tensors that cannot be merged.

    Args:
        different: Names that not all models have in one shape.
        lost: Names that all have, but not the base.
        heads: What the user wants: None, "drop", "keep:MODEL" or "separate".
        models: The models.
        problems: Where to say what is wrong.

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
    wanted = None
    if heads is not None and heads.startswith("keep:"):
        wanted = _named(heads.removeprefix("keep:"), models, problems)
    elif heads not in (None, "drop", "separate"):
        problems.append(f"`heads` must be 'drop', 'separate' or 'keep:MODEL', got {heads!r}")
    others = [*different, *lost]
    if not others and heads is not None and heads != "drop":
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


def _named(wanted: str, models: Sequence[Checkpoint], problems: list[str]) -> Checkpoint | None:
    """Return the model that the user means: by its name as it was given, by its path, or by the last part of it."""
    exact = [m for m in models if m.name == wanted or os.path.abspath(m.name) == os.path.abspath(wanted)]
    found = exact or [m for m in models if m.short_name == wanted]
    if not found:
        problems.append(f"`heads` names {wanted!r}, which is none of {', '.join(m.name for m in models)}")
    elif not exact and len(found) > 1:
        problems.append(f"`heads` names {wanted!r}, which is any of {', '.join(m.name for m in found)}: name one")
    return found[0] if found else None
