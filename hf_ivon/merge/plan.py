"""What a merge will do, and everything that is wrong with it, before any weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hf_ivon.merge.adapters import MODES, space_problems, whole_tensors
from hf_ivon.merge.files import Checkpoint
from hf_ivon.merge.folding import fold_problems, own_base
from hf_ivon.merge.matching import base_names, compare, dtype_problems, settle
from hf_ivon.merge.vocabulary import tokenizer_problems, unite
from hf_ivon.tensor_files import Entry

NEEDS_BASE = ("uncertainty", "task-arithmetic", "ties", "dare")
NEEDS_POSTERIOR = ("uncertainty", "gaussian", "fisher")
_HEADS = ("classifier", "score", "out_proj")  # what Transformers calls the layer whose rows are classes
METHODS = ("uncertainty", "gaussian", "fisher", "average", "task-arithmetic", "ties", "dare")
_FP32 = torch.finfo(torch.float32)  # in which most rules compute


@dataclass
class Plan:
    """A merge that can be run.

    Attributes:
        models: The models, in the user's order.
        base: What they were finetuned from; None for methods that do not need it.
        method: The rule.
        weights: One number per model.
        layout: Name, dtype and shape of every tensor of the result.
        merged: Names that the rule is applied to.
        kept: Names that are taken from one model.
        dropped: Names that are left out, or that go into the heads if these are kept apart.
        base_names: What the base calls the tensors that are merged.
        separate: Whether each model's head is kept apart.
        added_tokens: What the first model's tokenizer lacked, if tokens were united; None if nothing had to be.
        products: "concat" or "svd" if the models are adapters whose products are merged; then there is no layout.
        fold_into: The base model that merged adapters are folded into; None if they stay an adapter.
        density: Share of each difference that `ties` and `dare` keep.
        base_hessian: For `uncertainty`, the Hessian of the base; None is what the prior, or its posterior, says.
        prior_limit: Most that the prior's Hessian counts for as that of the base, loss/param².
        seed: Of what `dare` drops.
    """

    models: list[Checkpoint]
    base: Checkpoint | None
    method: str
    weights: list[float]
    layout: dict[str, Entry]
    merged: list[str]
    kept: dict[str, Checkpoint]
    dropped: list[str]
    base_names: dict[str, str]
    separate: bool = False
    added_tokens: list[str] | None = None
    products: str | None = None
    fold_into: Checkpoint | None = None
    density: float = 0.2
    base_hessian: float | None = None
    prior_limit: float = math.inf
    seed: int = 0

    def base_name(self, name: str) -> str:
        """Return a tensor's name in the base."""
        return self.base_names.get(name, name)

    def has_posterior(self, name: str) -> bool:
        """Tell whether every model has a variance for a tensor."""
        return all(m.posterior is not None and name in m.posterior.entries for m in self.models)

    def base_knows(self, name: str) -> bool:
        """Tell whether the base has a variance for a tensor."""
        posterior = None if self.base is None else self.base.posterior
        return posterior is not None and self.base_name(name) in posterior.entries

    def trusts(self, name: str) -> bool:
        """Tell whether the rule weighs a tensor by posteriors."""
        return self.method in NEEDS_POSTERIOR and name not in self.kept and self.has_posterior(name)

    def summary(self) -> dict[str, Any]:
        """Return the plan in JSON types."""
        size = sum(e.dtype.itemsize * e.numel for e in self.layout.values())
        plain = [n for n in self.merged if self.method in NEEDS_POSTERIOR and not self.has_posterior(n)]
        return {
            "method": self.method,
            "base_model": None if self.base is None else self.base.name,
            "models": [m.name for m in self.models],
            "weights": self.weights,
            "num_tensors": len(self.layout),
            "num_merged": len(self.merged),
            "num_bytes": size,
            "kept": {name: model.name for name, model in self.kept.items()},
            "dropped": [] if self.separate else self.dropped,
            "separate": self.dropped if self.separate else [],
            "products": self.products,
            "without_posterior": plain,
        }


def make_plan(
    models: Sequence[str],
    base_model: str | None,
    *,
    method: str,
    weights: Sequence[float] | Literal["examples"] | None = None,
    heads: str | None = None,
    tokenizer: str | None = None,
    adapters: str | None = None,
    into_base: bool = False,
    output_dir: Path | None = None,
    density: float = 0.2,
    base_hessian: float | None = None,
    seed: int = 0,
) -> Plan:
    """Look at all files' headers and return the plan.

    Args:
        models: Directories or repositories.
        base_model: What they were finetuned from.
        method: The rule.
        weights: One number per model; None is 1 each, "examples" the share of training examples.
        heads: What to do with tensors that differ: None, "drop", "keep:MODEL" or "separate".
        tokenizer: "union" to have the tokens of all models, where tokens were added to some.
        adapters: "concat" or "svd" to merge the products of adapters.
        into_base: Fold merged adapters into their base model.
        output_dir: Where the result goes; None if it is not written.
        density: Share that `ties` and `dare` keep.
        base_hessian: The Hessian of the base for `uncertainty`, loss/param².
        seed: Of what `dare` drops.

    Returns:
        The plan.

    Raises:
        ValueError: If anything is wrong; all problems are named.
    """
    products = adapters is not None
    needs_base = method in NEEDS_BASE and not products
    problems = _settings_problems(models, method, weights, output_dir, density, base_hessian)
    if needs_base and base_model is None:
        problems.append(f"`base_model` must be given for {method}, which starts from it")
    opened = [Checkpoint.open(m, problems) for m in models]
    # Of the others it is said already that they cannot be opened.
    found = [m for m in opened if m.directory.is_dir()]
    readable = [m for m in found if m.tensors]
    # Where the rule needs no base, it tells the heads, which it lacks, from the tensors that are merged.
    wanted = base_model is not None and (needs_base or (heads is not None and not products and not into_base))
    base = Checkpoint.open(base_model, problems) if base_model is not None and wanted else None
    fold_into = None
    if products or into_base or any(m.is_adapter for m in opened):
        problems += _adapter_problems(found, base, method, adapters, into_base)
    if into_base and opened and all(m.is_adapter for m in opened):
        fold_into = base or (Checkpoint.open(base_model, problems) if base_model is not None else None)
        if fold_into is None or fold_into.is_adapter:  # `base_model` is what the adapters started from
            fold_into = Checkpoint.open(own_base(opened, problems), problems)
        if not problems:
            problems += [problem for m in opened for problem in fold_problems(fold_into, m)]
    if method in NEEDS_POSTERIOR and not products:
        problems += [
            f"{m.name} has no posterior, which {method} needs: train it with IVON, or choose --method average"
            for m in found
            if m.posterior is None
        ]
    if base_model is None:
        problems += _base_problems(opened)
    problems += _posterior_problems([m for m in [*opened, base] if m is not None])
    added = _united(found, base, tokenizer, problems)
    common, different = compare(readable)
    if products:  # factors may differ; a classifier may not
        common, different = [], whole_tensors(different)
    of_base, lost = {}, []
    if base is not None and base.tensors:
        of_base = base_names({n: readable[0].tensors.entries[n] for n in common}, base)
        lost = [n for n in common if n not in of_base]
    common = [n for n in common if n not in set(lost)]
    is_whole = len(readable) == len(opened) and (base is None or bool(base.tensors))
    kept, dropped = settle(different, lost, heads, opened, problems, is_whole)
    merged = [n for n in common if n not in kept]
    problems += _label_problems(readable, merged)
    problems += dtype_problems(readable, merged, base if needs_base else None, of_base)
    if method in NEEDS_POSTERIOR and not products:
        problems += _name_problems(opened, common)
    numbers = _weights(opened, weights, problems)
    if not common and not products and not problems:
        problems.append("the models have no tensor in common")
    if problems:
        raise ValueError("The models cannot be merged: " + "; ".join(dict.fromkeys(problems)) + ".")
    layout = {n: opened[0].tensors.entries[n] for n in common} | {n: m.tensors.entries[n] for n, m in kept.items()}
    tensors = {} if products else dict(sorted(layout.items()))
    separate = heads == "separate" and bool(dropped)
    return Plan(
        models=opened,
        base=base if needs_base else None,
        method=method,
        weights=numbers,
        layout=tensors,
        merged=common,
        kept=kept,
        dropped=dropped,
        base_names=of_base,
        separate=separate,
        added_tokens=added,
        products=adapters,
        fold_into=fold_into,
        density=density,
        base_hessian=base_hessian,
        seed=seed,
    )


def _adapter_problems(
    models: Sequence[Checkpoint], base: Checkpoint | None, method: str, products: str | None, into_base: bool
) -> list[str]:
    if products is not None and products not in MODES:
        return [f"`adapters` must be one of {', '.join(MODES)}, got {products!r}"]
    others = [m.name for m in models if not m.is_adapter]
    if others:
        return [f"{', '.join(others)} is no adapter, so that there is nothing to merge with adapters or to fold"]
    starts = [base] if base is not None and base.is_adapter else []
    problems = space_problems([*models, *starts], products, into_base)
    if products is not None and method not in ("average", "task-arithmetic"):
        problems.append(f"products of adapters have no posterior for {method}: choose average or task-arithmetic")
    if products is None and method in NEEDS_BASE and (base is None or not base.is_adapter):
        problems.append(
            f"{method} of adapters needs the adapter that all of them started from as --base-model: without one "
            f"choose --method gaussian, fisher or average, or --adapters concat"
        )
    return problems


def _weights(
    models: Sequence[Checkpoint], weights: Sequence[float] | Literal["examples"] | None, problems: list[str]
) -> list[float]:
    if weights is None:
        return [1.0] * len(models)
    if weights != "examples":
        return [float(w) for w in weights]
    counts = [m.config.num_examples if m.config is not None else None for m in models]
    problems += [
        f"{m.name} does not say its number of training examples, which the weights shall follow: give numbers"
        for m, count in zip(models, counts, strict=True)
        if not count
    ]
    total = sum(count or 1 for count in counts)
    return [len(counts) * (count or 1) / total for count in counts]


def _settings_problems(
    models: Sequence[str],
    method: str,
    weights: Sequence[float] | Literal["examples"] | None,
    output_dir: Path | None,
    density: float,
    base_hessian: float | None,
) -> list[str]:
    problems = []
    if method not in METHODS:
        problems.append(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    if not models:
        problems.append("`models` must name at least one model")
    if isinstance(weights, str) and weights != "examples":
        problems.append(f"`weights` must be numbers or 'examples', got {weights!r}")
    elif weights is not None and not isinstance(weights, str):
        if len(weights) != len(models):
            problems.append(f"`weights` must be one per model, got {len(weights)} for {len(models)}")
        if not (all(0 <= w <= _FP32.max for w in weights) and any(w >= _FP32.tiny for w in weights)):
            problems.append(
                f"`weights` must be numbers of at least 0, not all 0, none above {_FP32.max:.2g}, got {list(weights)}"
            )
    if not 0 < density <= 1:
        problems.append(f"`density` must be in (0, 1], got {density}")
    if base_hessian is not None and not (method == "uncertainty" and 0 <= base_hessian < float("inf")):
        problems.append(f"`base_hessian` must be a number of at least 0, for uncertainty, got {base_hessian}")
    elif base_hessian is not None and base_hessian > _FP32.max:
        problems.append(f"`base_hessian` must be no more than {_FP32.max:.2g}, got {base_hessian}")
    if output_dir is not None and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        problems.append(f"`output_dir` must be empty or new, got {str(output_dir)!r}")
    elif output_dir is not None:
        there = next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            problems.append(f"`output_dir` must be where one can write, got {str(output_dir)!r}, in {str(there)!r}")
    return problems


def _base_problems(models: Sequence[Checkpoint]) -> list[str]:
    """Compare what the models say they were finetuned from, by the last part of its name: copies lie anywhere."""
    said = {m.name: m.config.base_model for m in models if m.config is not None and m.config.base_model}
    if len({Path(base.rstrip("/")).name for base in said.values()}) < 2:
        return []
    listed = ", ".join(f"{name} from {base}" for name, base in said.items())
    return [f"the models were finetuned from different ones ({listed}): if these are one, name it by --base-model"]


def _name_problems(models: Sequence[Checkpoint], common: Sequence[str]) -> list[str]:
    """Look for posteriors that go by other names than the files: the rule would be one without posteriors."""
    posteriors = [m.posterior.entries for m in models if m.posterior is not None]
    if not common or len(posteriors) < len(models) or any(all(n in p for p in posteriors) for n in common):
        return []
    names = ", ".join(f"`{next(iter(p), '')}`" for p in posteriors)
    return [
        f"no tensor that would be merged has a variance in every posterior: the files have names such as "
        f"`{common[0]}`, the posteriors {names}; choose --method average"
    ]


def _label_problems(models: Sequence[Checkpoint], merged: Sequence[str]) -> list[str]:
    """Look for models that have the same classes in another order, where their heads are merged."""
    labels: list[Any] = [m.json("config.json").get("id2label") or {} for m in models]
    if wrong := [m.name for m, own in zip(models, labels, strict=True) if not isinstance(own, dict)]:
        return [f"`id2label` in config.json of {', '.join(wrong)} is no mapping of classes to names: save it again"]
    shapes = {n: models[0].tensors.entries[n].shape for n in merged}
    heads = [n for n, s in shapes.items() if n.split(".")[-2:][0] in _HEADS and s[:1] == (len(labels[0]),)]
    for model, own in zip(models, labels, strict=True):
        first = next((k for k, v in labels[0].items() if own.get(k) != v), None)
        if heads and first is not None and set(own.values()) == set(labels[0].values()):
            return [
                f"the models order their classes differently ({first} is {labels[0][first]!r} in {models[0].name}, "
                f"and {own.get(first)!r} in {model.name}): retrain one, or pass --heads separate and --base-model"
            ]
    return []


def _posterior_problems(checkpoints: Sequence[Checkpoint]) -> list[str]:
    problems = []
    for checkpoint in checkpoints:
        for name, entry in (checkpoint.posterior.entries if checkpoint.posterior else {}).items():
            mean = checkpoint.tensors.entries.get(name)
            if mean is not None and mean.shape != entry.shape:
                problems.append(
                    f"the posterior of {checkpoint.name} has shape {entry.shape} for `{name}`: {mean.shape}"
                )
    return problems


def _united(
    models: Sequence[Checkpoint], base: Checkpoint | None, tokenizer: str | None, problems: list[str]
) -> list[str] | None:
    """Check the tokenizers, and unite their tokens if that is asked for."""
    if tokenizer not in (None, "union"):
        problems.append(f"`tokenizer` must be 'union' or nothing, got {tokenizer!r}")
        return None
    problems += tokenizer_problems(models, tokenizer == "union")
    return unite(models, base, problems) if tokenizer == "union" and not problems else None
