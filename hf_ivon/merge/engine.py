"""Merges checkpoints, a few million weights at a time, into a directory that appears when it is whole."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ivon.checkpoint import CONFIG_NAME, POSTERIOR_NAME, variance_problems
from hf_ivon.merge import methods
from hf_ivon.merge.files import Checkpoint, Writer, replace_in_header, row_blocks
from hf_ivon.merge.plan import NEEDS_POSTERIOR, Plan, make_plan
from hf_ivon.posterior import mean_digest
from hf_ivon.posterior_config import PosteriorConfig, library_versions
from hf_ivon.tensor_files import Entry, TensorFiles

logger = logging.getLogger(__name__)

_BLOCK = 2**22  # weights in memory at a time, of each model
REPORT_NAME = "merge_report.json"
PLACEHOLDER = "0" * 64  # of the mean's digest, which is known when the mean is written
# What a directory is used with; the mean, the posterior and what belongs to one run are not carried over.
_LEFT_BEHIND = (
    "posterior",
    "optimizer",
    "scheduler",
    "rng_state",
    "training_args",
    "trainer_state",
    "README",
    "events",
)


def merge(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    method: str = "uncertainty",
    weights: Sequence[float] | None = None,
    heads: str | None = None,
    revisions: Sequence[str | None] | None = None,
    dtype: torch.dtype | None = None,
    density: float = 0.2,
    seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merge finetuned models, each weight trusted as far as its posterior says.

    Args:
        models: Directories or repositories on the Hub, each with its posterior where the method needs one.
        output_dir: Where the merge goes; must be empty or new.
        base_model: The model that all were finetuned from; for `uncertainty`, `task-arithmetic`, `ties` and `dare`.
        method: ``"uncertainty"``, ``"gaussian"``, ``"fisher"``, ``"average"``, ``"task-arithmetic"``, ``"ties"`` or
            ``"dare"``; see `hf_ivon.merge.methods`.
        weights: One number per model, at least 0; 1 each by default.
        heads: What to do with tensors that not all models have in one shape: ``"drop"``, or ``"keep:MODEL"``.
        revisions: One per model, for those on the Hub.
        dtype: Of the merged weights; the first model's by default.
        density: Share of each difference that `ties` and `dare` keep.
        seed: Of what `dare` drops.
        dry_run: Look for problems and return the plan without reading weights.

    Returns:
        The report, which also stands in `merge_report.json`.

    Raises:
        ValueError: If something is wrong with the models or the settings; all problems are named, nothing is written.
    """
    plan = make_plan(
        [str(m) for m in models],
        None if base_model is None else str(base_model),
        method=method,
        weights=weights,
        heads=heads,
        revisions=revisions,
        output_dir=Path(output_dir),
        density=density,
    )
    report: dict[str, Any] = plan.summary()
    if dry_run:
        return report
    _check_pairs(plan)
    target = Path(output_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        report["tensors"] = _write(plan, work, dtype, density, seed)
        report["notes"] = _notes(plan, report["tensors"])
        _carry_over(plan, work)
        (work / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()  # the plan made sure that it is empty
        os.chmod(work, 0o755)
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for note in report["notes"]:
        logger.warning("%s", note)
    return report


def _check_pairs(plan: Plan) -> None:
    """Make sure that every posterior that is used belongs to its mean, reading one tensor at a time."""
    used = [*plan.models, *([plan.base] if plan.base else [])] if plan.method in NEEDS_POSTERIOR else []
    problems = []
    for model in used:
        if model.posterior is None or model.config is None:
            continue
        names = model.posterior.entries.keys()
        # Some models are saved with tensors renamed; their posterior cannot be told from here.
        if names <= model.tensors.entries.keys() and mean_digest(model.tensors, names) != model.config.mean_digest:
            problems.append(f"the posterior of {model.name} does not belong to the weights beside it")
    if problems:
        raise ValueError(
            f"The models cannot be merged: {'; '.join(problems)}. Download them again, or retrain the posterior."
        )


def _write(plan: Plan, work: Path, dtype: torch.dtype | None, density: float, seed: int) -> dict[str, Any]:
    """Write the merged mean, and the posterior where the method yields one; return what each tensor was made of."""
    layout = {name: (_dtype(plan.layout[name], dtype), plan.layout[name].shape) for name in plan.layout}
    file = "adapter_model.safetensors" if plan.models[0].is_adapter else "model.safetensors"
    with_posterior = [n for n in plan.merged if plan.method == "gaussian" and plan.has_posterior(n)]
    variances = {name: (torch.float32, plan.layout[name].shape) for name in with_posterior}
    described = {}
    with (
        Writer(work / file, layout, {"format": "pt"}) as mean_file,
        Writer(work / POSTERIOR_NAME, variances, {"format": "pt", "mean_digest": PLACEHOLDER}) as posterior_file,
    ):
        for name in plan.layout:
            statistics = _Statistics(len(plan.models))
            whole = plan.method in ("ties", "dare")
            for start, stop in row_blocks(plan.layout[name].shape, 2**62 if whole else _BLOCK):
                merged, precision = _merge_rows(plan, name, start, stop, statistics, density, seed)
                mean_file.write(merged.to(layout[name][0]))
                if name in variances:
                    posterior_file.write(precision.reciprocal().float())
            described[name] = statistics.summary() if name in plan.merged else {"kept": plan.kept[name].name}
    if not variances:
        (work / POSTERIOR_NAME).unlink()
    else:
        _write_posterior_config(plan, work, with_posterior)
    return described


def _merge_rows(
    plan: Plan, name: str, start: int, stop: int, statistics: _Statistics, density: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return rows of the merged tensor in fp32 (fp64 stays), and of its precision (empty where there is none)."""
    nothing = torch.empty(0)
    if name in plan.kept:
        return plan.kept[name].tensors.rows(name, start, stop), nothing
    parts = [m.tensors.rows(name, start, stop) for m in plan.models]
    if not parts[0].is_floating_point():
        if any(not torch.equal(parts[0], p) for p in parts[1:]):
            raise ValueError(f"The tensor `{name}` holds no real numbers and differs between the models. Use --heads.")
        return parts[0], nothing
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    parts = [p.to(wide) for p in parts]
    for model, part in zip(plan.models, parts, strict=True):
        if not torch.isfinite(part).all():
            raise ValueError(f"The tensor `{name}` of {model.name} holds NaN or inf. Check that model.")
    weights, precision = plan.weights, nothing
    base = plan.base.tensors.rows(plan.base_name(name), start, stop).to(wide) if plan.base else nothing
    trusted = plan.method in ("uncertainty", "gaussian", "fisher") and plan.has_posterior(name)
    hessians = [_hessian(m, name, start, stop, wide) for m in plan.models] if trusted else []
    if plan.method == "uncertainty" and trusted:
        merged = methods.uncertainty(base, parts, hessians, _base_hessian(plan, name, start, stop, wide), weights)
    elif plan.method == "gaussian" and trusted:
        precisions = [_precision(m, name, start, stop, wide) for m in plan.models]
        merged, precision = methods.gaussian(parts, precisions, weights)
    elif plan.method == "fisher" and trusted:
        merged = methods.fisher(parts, hessians, weights)
    elif plan.method in ("uncertainty", "task-arithmetic"):
        merged = methods.task_arithmetic(base, parts, weights)
    elif plan.method == "ties":
        merged = methods.ties(base, parts, weights, density)
    elif plan.method == "dare":
        merged = methods.dare(base, parts, weights, density, seed)
    else:
        merged = methods.average(parts, weights)
    statistics.add(merged, parts, hessians, weights)
    return merged, precision


def _precision(model: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    assert model.posterior is not None  # the plan made sure
    variance = model.posterior.rows(name, start, stop).to(dtype)
    if problems := variance_problems(name, variance):
        raise ValueError(f"The posterior of {model.name} cannot be used: {problems[0]}. Retrain it.")
    return variance.reciprocal_()


def _hessian(model: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return the Hessian of the summed loss, N * h: precision / ess is h + delta, per example."""
    config = model.config
    assert config is not None  # the plan made sure
    per_example = _precision(model, name, start, stop, dtype).div_(config.of("ess", name))
    return per_example.sub_(config.of("weight_decay", name)).clamp_min_(0).mul_(size_of(config, name))


def size_of(config: PosteriorConfig, name: str) -> float:
    """Return what the training loss averaged over: label tokens, or examples; `ess` where neither is known."""
    size = config.num_tokens if config.num_tokens is not None else config.num_examples
    return float(config.of("ess", name) if size is None else size)


def _base_hessian(plan: Plan, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return the base's own Hessian if it has a posterior, else the prior's, averaged over the models."""
    base = plan.base
    if base is not None and base.posterior is not None and plan.base_name(name) in base.posterior.entries:
        return _hessian(base, plan.base_name(name), start, stop, dtype)
    configs = [m.config for m in plan.models if m.config is not None]
    prior = sum(size_of(c, name) * c.of("weight_decay", name) for c in configs) / len(configs)
    return torch.tensor(prior, dtype=dtype)


class _Statistics:
    """How much each model contributed to a tensor, and how far the merge is from the plain average."""

    def __init__(self, num: int) -> None:
        self._shares = [0.0] * num
        self._distance = self._norm = 0.0

    def add(
        self, merged: Tensor, parts: Sequence[Tensor], hessians: Sequence[Tensor], weights: Sequence[float]
    ) -> None:
        plain = methods.average(parts, weights)
        self._distance += float((merged - plain).double().square().sum())
        spread = sum(float((p - plain).double().square().sum()) for p in parts)
        self._norm += spread
        trust = [float(h.double().sum()) * w for h, w in zip(hessians, weights, strict=True)] if hessians else weights
        self._shares = [s + float(t) for s, t in zip(self._shares, trust, strict=True)]

    def summary(self) -> dict[str, Any]:
        total = sum(self._shares)
        shares = [s / total if total else 1 / len(self._shares) for s in self._shares]
        relative = (self._distance / self._norm) ** 0.5 if self._norm else 0.0
        return {"shares": shares, "distance_from_average": relative}


def _notes(plan: Plan, tensors: dict[str, Any]) -> list[str]:
    distances = [t["distance_from_average"] for t in tensors.values() if "distance_from_average" in t]
    if plan.method in ("fisher", "gaussian") and distances and max(distances) < 0.01:
        return [
            f"The posteriors are so flat that {plan.method} is plain averaging: nowhere is the merge more than 1% of "
            f"the models' spread away from it. Longer training, or a smaller beta2, lets the Hessians move."
        ]
    return []


def _dtype(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype


def _write_posterior_config(plan: Plan, work: Path, names: Iterable[str]) -> None:
    """Write what the product of the posteriors is: their effective sample sizes add up, their priors are averaged."""
    configs = [m.config for m in plan.models if m.config is not None]

    def of(key: str) -> float | dict[str, float]:
        by_name = {}
        for name in names:
            scale = [w * c.of("ess", name) for w, c in zip(plan.weights, configs, strict=True)]
            values = [1.0] * len(scale) if key == "ess" else [c.of(key, name) for c in configs]
            total = sum(s * v for s, v in zip(scale, values, strict=True))
            by_name[name] = total if key == "ess" else total / sum(scale)
        return next(iter(by_name.values())) if len(set(by_name.values())) == 1 else by_name

    stem = "adapter_model" if plan.models[0].is_adapter else "model"
    digest = mean_digest(TensorFiles(work, stem, []), names)
    replace_in_header(work / POSTERIOR_NAME, PLACEHOLDER, digest)
    counts = [c.num_examples for c in configs]
    tokens = [c.num_tokens for c in configs]
    config = dataclasses.replace(
        configs[0],
        ess=of("ess"),
        weight_decay=of("weight_decay"),
        hess_init=of("hess_init"),
        num_examples=None if None in counts else sum(c for c in counts if c is not None),
        num_tokens=None if None in tokens else sum(t for t in tokens if t is not None),
        steps=sum(c.steps for c in configs),
        estimator="merge-gaussian",
        mean_digest=digest,
        versions=library_versions(),
    )
    (work / CONFIG_NAME).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def _carry_over(plan: Plan, work: Path) -> None:
    """Copy configuration, tokenizer, templates and licence of the model whose head is kept, or of the first."""
    source = next(iter(plan.kept.values())) if plan.kept else plan.models[0]
    for file in sorted(source.directory.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not file.name.startswith((".", *_LEFT_BEHIND)):
            shutil.copyfile(file, work / file.name)
