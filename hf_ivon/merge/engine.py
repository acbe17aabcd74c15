"""Merges checkpoints, a few million weights at a time, into a directory that appears when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_ivon.checkpoint import CONFIG_NAME, posterior_files
from hf_ivon.json_files import write_json
from hf_ivon.mean import mean_digest
from hf_ivon.merge import report as reporting
from hf_ivon.merge.adapters import drop_saved, merge_products, wide_dtype
from hf_ivon.merge.files import Checkpoint, Writer, module_directories, replace_in_header
from hf_ivon.merge.folding import fold
from hf_ivon.merge.heads import HEADS, write_heads
from hf_ivon.merge.hessians import limit_prior, limited_prior, number_for_base, start_trust
from hf_ivon.merge.plan import NEEDS_POSTERIOR, Plan, make_plan
from hf_ivon.merge.rules import merge_tensors
from hf_ivon.merge.vocabulary import write_tokenizer
from hf_ivon.posterior_config import library_versions
from hf_ivon.tensor_files import Entry, TensorFiles

logger = logging.getLogger(__name__)

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
    "results",
    "all_results",
    "train_results",
    "eval_results",
    "sensitivity",
    "sweep",
    REPORT_NAME,
)
_OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf")  # of the weights
_FIGURES = (".png", ".svg", ".pdf", ".jpg")  # they show the model that was merged


def merge(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    method: str = "uncertainty",
    weights: Sequence[float] | Literal["examples"] | None = None,
    heads: str | None = None,
    tokenizer: str | None = None,
    adapters: str | None = None,
    into_base: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    density: float = 0.2,
    base_hessian: float | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Merge finetuned models, each weight trusted as far as its posterior says.

    Args:
        models: Directories or repositories on the Hub ("ID" or "ID@REVISION"), each with its posterior where the
            method needs one.
        output_dir: Where the merge goes; must be empty or new.
        base_model: The model that all were finetuned from; for `uncertainty`, `task-arithmetic`, `ties` and `dare`.
        method: ``"uncertainty"``, ``"gaussian"``, ``"fisher"``, ``"average"``, ``"task-arithmetic"``, ``"ties"`` or
            ``"dare"``; see `hf_ivon.merge.methods`.
        weights: One number per model, at least 0; 1 each by default; ``"examples"`` takes the models' numbers of
            training examples, scaled to 1 on average.
        heads: What to do with tensors that not all models have in one shape: ``"drop"``, ``"keep:MODEL"``, or
            ``"separate"``: each model's own, in `heads/MODEL`, for `load_head`.
        tokenizer: ``"union"`` for the tokens of all models, where tokens were added to some; a row that a model lacks
            is the average of those that have it.
        adapters: How to merge LoRA adapters of different ranks or targets, by `average` or `task-arithmetic`:
            ``"concat"`` keeps the sum of their products exactly, ``"svd"`` at the largest of their ranks. By default A
            is merged with A and B with B, which needs adapters of one kind.
        into_base: Fold merged LoRA adapters into their base model, and write that; or into `base_model`, unless that
            is the adapter that they started from.
        dtype: Of the merged weights; by default the first model's, or the base's if adapters are folded into it.
        max_shard_size: Largest file, in bytes or like "5GB"; adapters are always one file.
        density: Share of each difference that `ties` and `dare` keep.
        base_hessian: For `uncertainty`: the Hessian of the base, loss/param²; small trusts the models' own Hessians
            alone. By default it is that of the base's posterior, if there is one; else the prior's, but no more than
            the models' Hessians are on average.
        seed: Of what `dare` drops.
        dry_run: Look for problems and return the plan without reading weights.

    Returns:
        The report, which also stands in `merge_report.json`.

    Raises:
        TypeError: If `models` is one model, and no list.
        ValueError: If something is wrong with the models or the settings; all problems are named, nothing is written.
        OSError: If it cannot be written; a merge that is whole is kept where the message says.
    """
    if isinstance(models, str | os.PathLike):
        raise TypeError(f"`models` must be a list of directories or repositories, got {models!r}. Put it into a list.")
    target = Path(os.path.realpath(output_dir))
    plan = make_plan(
        [str(m) for m in models],
        None if base_model is None else str(base_model),
        method=method,
        weights=weights,
        heads=heads,
        tokenizer=tokenizer,
        adapters=adapters,
        into_base=into_base,
        output_dir=target,
        density=density,
        base_hessian=base_hessian,
        seed=seed,
    )
    report: dict[str, Any] = plan.summary()
    if dry_run:
        return report
    work = _work_directory(target)
    stays = False
    written = dtype if plan.fold_into is None else wide_dtype(plan.models)  # rounded once, when it is folded
    try:
        plan = limit_prior(plan)
        if plan.products is None:
            report["tensors"] = _write_checked(plan, work, written, max_shard_size)
        else:
            report["tensors"] = {}
            report["ranks"] = merge_products(
                plan.models, plan.weights, plan.products, plan.method, work,
                dtype=written, kept=plan.kept, dropped=plan.dropped,
            )  # fmt: skip
        report["notes"] = reporting.notes(plan.method, report["tensors"], limited_prior(plan))
        source = next(iter(plan.kept.values())) if plan.kept else plan.models[0]
        _carry_over(source, work)
        if source.is_adapter:
            drop_saved(work, plan.dropped)
        if plan.separate:
            write_heads(plan, work)
        if plan.added_tokens is not None:
            write_tokenizer(source, plan.models, work)
        if plan.fold_into is not None:
            _fold(plan.fold_into, work, max_shard_size, dtype)
        if dtype is not None:
            for file in (work / "config.json", *work.glob(f"{HEADS}/*/config.json")):
                _write_dtype(file, dtype)
        (work / "README.md").write_text(reporting.card(report), encoding="utf-8")
        write_json(work / REPORT_NAME, report)
        os.chmod(work, 0o755)
        try:
            _put(work, target)
        except OSError as err:
            stays = True
            raise OSError(f"The merge is whole in {work}, but cannot be moved to {target} ({err}). Move it.") from err
    finally:
        if not stays:
            shutil.rmtree(work, ignore_errors=True)
    for note in report["notes"]:
        logger.warning("%s", note)
    return report


def _work_directory(target: Path) -> Path:
    """Make a directory beside the target, or in it where it may be written and what it is in may not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        return Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError:
        if not target.is_dir():
            raise
        return Path(tempfile.mkdtemp(prefix=".merge-", dir=target))


def _put(work: Path, target: Path) -> None:
    """Let a merge that is whole appear where it is wanted."""
    if target.is_dir() and not os.path.samefile(target, os.getcwd()):
        with contextlib.suppress(OSError):  # as of a mount point
            target.rmdir()  # the plan made sure that it is empty
    if not target.exists():
        os.replace(work, target)
        return
    for entry in sorted(work.iterdir(), key=lambda e: e.name == "config.json"):  # last, as nothing loads without it
        shutil.move(entry, target / entry.name)


def _write_dtype(file: Path, dtype: torch.dtype) -> None:
    """Have a model's configuration say what its weights are saved in, which is what it is loaded in."""

    def told(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        name = str(dtype).removeprefix("torch.")
        return {k: name if k in ("dtype", "torch_dtype") and v is not None else told(v) for k, v in config.items()}

    if file.is_file():
        name = str(dtype).removeprefix("torch.")
        write_json(file, {**told(json.loads(file.read_text(encoding="utf-8"))), "dtype": name})


def _write_checked(plan: Plan, work: Path, dtype: torch.dtype | None, max_shard_size: int | str) -> dict[str, Any]:
    """Write the merge, and make sure meanwhile that every posterior belongs to its mean."""
    with ThreadPoolExecutor(max_workers=1) as checker:
        pairs = checker.submit(_pair_problems, plan)  # reads what the merge reads, at the same time
        try:
            described = _write(plan, work, dtype, max_shard_size, pairs)
        except ValueError:  # such as of NaN, which weights that were changed after the posterior was saved may hold
            _raise_problems(pairs.result())
            raise
        finally:
            pairs.cancel()
        _raise_problems(pairs.result())
    return described


def _fold(base: Checkpoint, work: Path, max_shard_size: int | str, dtype: torch.dtype | None) -> None:
    """Replace the merged adapter by its base model with the adapter folded in."""
    fold(base, Checkpoint.open(str(work), []), work, max_shard_size, dtype)
    for file in [*work.glob("adapter_*"), *posterior_files(work)]:
        file.unlink()
    _carry_over(base, work)


def merged_state_dict(plan: Plan) -> dict[str, Tensor]:
    """Return the merged weights in memory, without writing or checking pairs: for looking at many merges.

    Args:
        plan: As `make_plan` returns it.

    Returns:
        Tensors by name, in the dtypes of the first model.
    """
    plan = limit_prior(plan)
    merged = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in plan.layout.items()}

    def keep(name: str, rows: Tensor, start: int, variance: Tensor | None) -> None:
        place = merged[name]
        (place[start : start + len(rows)] if rows.ndim else place).copy_(rows)

    for _ in merge_tensors(plan, {name: tensor.dtype for name, tensor in merged.items()}, keep):
        pass
    return merged


def _pair_problems(plan: Plan) -> list[str]:
    """Name every posterior that is used and does not belong to its mean, reading one tensor at a time."""
    used = [*plan.models, *([plan.base] if plan.base else [])] if plan.method in NEEDS_POSTERIOR else []
    problems = []
    for model in used:
        if model.posterior is None or model.config is None:
            continue
        names = model.posterior.entries.keys()
        mean: Any = getattr(model.tensors, "original", model.tensors)
        # Some models are saved with tensors renamed; their posterior cannot be told from here.
        if names <= mean.keys() and mean_digest(mean, names, model.prefix) != model.config.mean_digest:
            problems.append(f"the posterior of {model.name} does not belong to the weights beside it")
    return problems


def check_pairs(plan: Plan) -> None:
    """Make sure that every posterior that is used belongs to its mean.

    Raises:
        ValueError: If one does not.
    """
    _raise_problems(_pair_problems(plan))


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"The models cannot be merged: {'; '.join(problems)}. Download them again, or retrain the posterior."
        )


def _write(
    plan: Plan, work: Path, dtype: torch.dtype | None, max_shard_size: int | str, pairs: Future[list[str]]
) -> dict[str, Any]:
    """Write the merged mean, and the posterior where the method yields one; return what each tensor was made of."""
    layout = {name: (_dtype(plan.layout[name], dtype), plan.layout[name].shape) for name in plan.layout}
    is_adapter = plan.models[0].is_adapter
    stem, size = ("adapter_model", 2**62) if is_adapter else ("model", max_shard_size)
    with_posterior = [n for n in plan.layout if plan.method == "gaussian" and plan.trusts(n)]
    prefix = plan.models[0].prefix
    variances = {prefix + name: (torch.float32, plan.layout[name].shape) for name in with_posterior}
    statistics = {name: reporting.TensorStatistics(len(plan.models)) for name in plan.layout}
    with (
        Writer(work, stem, layout, {"format": "pt"}, size) as mean_file,
        Writer(work, "posterior", variances, {"format": "pt", "mean_digest": PLACEHOLDER}, size) as posterior_file,
        tqdm(total=sum(e.numel for e in plan.layout.values()), desc="Merging", unit="weight", unit_scale=True) as bar,
    ):

        def write(name: str, rows: Tensor, start: int, variance: Tensor | None) -> None:
            mean_file.write(name, rows, start)
            if variance is not None:
                posterior_file.write(prefix + name, variance, start)

        dtypes = {name: wanted for name, (wanted, _) in layout.items()}
        # Closed before the files are: no thread may write into one that is.
        with closing(merge_tensors(plan, dtypes, write)) as blocks:
            for name, count, found in blocks:
                if pairs.done():
                    _raise_problems(pairs.result())
                statistics[name].absorb(found)
                bar.update(count)
    if variances:
        _complete_posterior(plan, work, with_posterior, stem, posterior_file.files)
    return {
        name: {"kept": plan.kept[name].name}
        if name in plan.kept
        else found.summary(start_trust(plan, name), number_for_base(plan, name))
        for name, found in statistics.items()
    }


def _dtype(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype


def _complete_posterior(plan: Plan, work: Path, names: Iterable[str], stem: str, files: Sequence[Path]) -> None:
    """Write what the product of the posteriors is: their effective sample sizes add up, their priors are averaged."""
    configs = [m.config for m in plan.models if m.config is not None]
    prefix = plan.models[0].prefix

    def of(key: str) -> float | dict[str, float]:
        by_name = {}
        for name in names:
            scale = [w * c.of("ess", name) for w, c in zip(plan.weights, configs, strict=True)]
            values = [1.0] * len(scale) if key == "ess" else [c.of(key, name) for c in configs]
            total = sum(s * v for s, v in zip(scale, values, strict=True))
            by_name[prefix + name] = total if key == "ess" else total / sum(scale)
        return next(iter(by_name.values())) if len(set(by_name.values())) == 1 else by_name

    digest = mean_digest(TensorFiles(work, stem, []), names, prefix)
    for file in files:
        replace_in_header(file, PLACEHOLDER, digest)
    index = work / "posterior.safetensors.index.json"
    if index.is_file():
        index.write_text(index.read_text(encoding="utf-8").replace(PLACEHOLDER, digest), encoding="utf-8")

    def count(counts: Sequence[int | None]) -> int | None:
        """Return how many examples there were, each model's as often as its weight says, as in the precision."""
        known = [w * c for w, c in zip(plan.weights, counts, strict=True) if c is not None]
        return max(1, round(sum(known))) if len(known) == len(counts) else None

    config = dataclasses.replace(
        configs[0],
        ess=of("ess"),
        weight_decay=of("weight_decay"),
        hess_init=of("hess_init"),
        num_examples=count([c.num_examples for c in configs]),
        num_tokens=count([c.num_tokens for c in configs]),
        steps=sum(c.steps for c in configs),
        estimator="merge-gaussian",
        mean_digest=digest,
        versions=library_versions(),
    )
    write_json(work / CONFIG_NAME, config.to_dict())


def _carry_over(source: Checkpoint, work: Path) -> None:
    """Copy configuration, tokenizer, templates and licence, where there are none yet."""
    for file in sorted(source.directory.iterdir()):
        stale = file.suffix in (*_OTHER_FORMATS, *_FIGURES) or file.name.endswith(".index.json")
        wanted = file.is_file() and not stale and not file.name.startswith((".", *_LEFT_BEHIND))
        if wanted and not (work / file.name).exists():
            shutil.copyfile(file, work / file.name)
    for module in module_directories(source.directory):  # of a SentenceTransformer: such as how to pool
        place = work / module.relative_to(source.directory)
        if module.is_dir() and not place.exists():
            shutil.copytree(module, place)
