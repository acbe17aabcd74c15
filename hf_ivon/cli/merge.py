"""`hf-ivon merge`: several finetuned models into one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ivon.cli.outputs import FAILURES, check_directory

if TYPE_CHECKING:
    from hf_ivon.merge.plan import Plan

_LISTS = {
    "merge": ("--models", "--weights", "--data", "--text-columns"),
    "curvature": ("--text-columns",),
    "evaluate": ("--text-columns", "--ood-text-columns"),
    "sensitivity": ("--text-columns",),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def spread(arguments: Sequence[str]) -> list[str]:
    """Return `--models A B` as `--models A --models B`, which is what the parser knows.

    An option without any value comes last, where the parser finds that there is none.

    Args:
        arguments: The command's name, and what follows it.
    """
    lists = _LISTS.get(arguments[0], ()) if arguments else ()
    result: list[str] = []
    bare: list[str] = []
    option = None
    for argument, following in pairwise([*arguments, "--"]):
        if argument.startswith("--"):
            name, equals, _ = argument.partition("=")
            option = name if name in lists else None
            result += [] if option and not equals else [argument]
            bare += [argument] if argument == option and following.startswith("--") else []
        else:
            result += [option, argument] if option else [argument]
    return result + bare[:1]


def merge(
    models: Annotated[
        list[str], typer.Option(help="Directories or repositories (ID or ID@REVISION): --models A B C.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Where the merge goes; must be empty or new.")],
    base_model: Annotated[str | None, typer.Option(help="The model that all were finetuned from.")] = None,
    method: Annotated[
        str, typer.Option(help="uncertainty, gaussian, fisher, average, task-arithmetic, ties or dare.")
    ] = "uncertainty",
    weights: Annotated[
        list[str] | None, typer.Option(help="One number per model: --weights 1 0.5 2; or examples, for their numbers.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="For tensors that differ between the models: drop, separate, or keep:MODEL.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="union: the tokens of all models, where tokens were added to some.")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="For LoRA adapters of different ranks or targets: concat or svd.")
    ] = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Fold merged adapters into their base model.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help=f"Of the merged weights: {', '.join(_DTYPES)}.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file: bytes, or like 5GB.")] = "5GB",
    density: Annotated[float, typer.Option(help="Share of each difference that ties and dare keep.")] = 0.2,
    base_hessian: Annotated[
        float | None,
        typer.Option(
            help="For uncertainty: a number in place of the base's, or the prior's; small trusts the models."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    sweep: Annotated[
        int | None, typer.Option(min=1, help="Try all weights in steps of 1/N, and merge with the best.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="What the weights of a sweep add up to; 1 by default.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Labelled rows for a sweep: --data NAME=FILE NAME=FILE.")
    ] = None,
    text_columns: Annotated[list[str] | None, typer.Option(help="Columns of the data that hold text.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens at which a text of the data is cut; 128 by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and its problems; read no weights.")
    ] = False,
) -> None:
    """Merge finetuned models, each weight trusted as far as its posterior says. Exits with 2 if it cannot."""
    import torch

    from hf_ivon.merge import merge as run
    from hf_ivon.merge.heads import source_of
    from hf_ivon.merge.plan import make_plan
    from hf_ivon.merge.sweep import check_plan

    if dtype is not None and dtype not in _DTYPES:
        raise typer.BadParameter(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    rule: dict[str, Any] = {"base_model": base_model, "method": method, "heads": heads, "density": density}
    rule["base_hessian"] = base_hessian
    try:
        chosen, largest = _numbers(weights), _bytes(max_shard_size)
        points = None
        if not dry_run:
            check_directory("output_dir", output_dir)
        if sweep is None:
            of_sweep = {"scale": scale, "data": data, "text_columns": text_columns, "max_length": max_length}
            if given := [f"`{name}`" for name, value in of_sweep.items() if value is not None]:
                raise ValueError(
                    f"{', '.join(given)} must be left out without a sweep. Add --sweep N, or leave it out."
                )
        else:
            if adapters is not None or into_base:
                raise ValueError("`adapters` and `into_base` must be left out in a sweep, which is of whole models.")
            if weights:
                raise ValueError("`weights` must be left out in a sweep, which finds them. Leave out one of the two.")
            files, total = _files(data or []), 1.0 if scale is None else scale
            plan = make_plan([str(m) for m in models], output_dir=output_dir, tokenizer=tokenizer, seed=seed, **rule)
            check_plan(plan, sweep, total)
            for name in files:
                source_of(plan, name)
            if not dry_run:
                columns = {"text_columns": text_columns or [], "max_length": max_length or 128}
                points = _sweep(plan, files, sweep, total, columns)
                chosen = max(points, key=lambda point: point["score"])["weights"]
        report = run(
            models,
            output_dir,
            **rule,
            weights=chosen,
            tokenizer=tokenizer,
            adapters=adapters,
            into_base=into_base,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_size=largest,
            seed=seed,
            dry_run=dry_run,
        )
        if points is not None:
            _keep_sweep(points, output_dir)
    except FAILURES as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(2) from None
    _show(report, output_dir, dry_run)


def _numbers(weights: Sequence[str] | None) -> list[float] | Any:
    if not weights or list(weights) == ["examples"]:
        return weights and "examples"
    try:
        return [float(w) for w in weights]
    except ValueError:
        raise ValueError(f"`weights` must be numbers or 'examples', got {' '.join(weights)}.") from None


def _bytes(size: str) -> int | str:
    if not re.fullmatch(r"\d+(\.\d+)?[TGMK]B|\d+", size, re.IGNORECASE) or not float(size.rstrip("TGMKBtgmkb")):
        raise ValueError(
            f"`max_shard_size` must be a number of bytes, or one with KB, MB, GB or TB, more than 0, got {size!r}."
        )
    return int(size) if size.isdecimal() else size


def _files(data: Sequence[str]) -> dict[str, str]:
    """Return a sweep's files by the names of their data sets."""
    files = dict(item.partition("=")[::2] for item in data)
    if not files or not all(files.values()):
        raise ValueError(f"`data` must be given for a sweep as NAME=FILE, got {' '.join(data) or 'none'}.")
    if len(files) < len(data):
        raise ValueError(f"`data` must be given for a sweep by different names, got {' '.join(data)}.")
    if missing := [file for file in files.values() if not Path(file).is_file()]:
        raise ValueError(f"`data` must name files, got {', '.join(missing)}, which are not there. Check the paths.")
    return files


def _sweep(
    plan: Plan, files: Mapping[str, str], steps: int, scale: float, columns: dict[str, Any]
) -> list[dict[str, Any]]:
    """Evaluate merges along a grid, print a table, and return the points."""
    from functools import partial

    from hf_ivon.data import evaluate, load_batches, load_checkpoint
    from hf_ivon.merge.heads import source_of
    from hf_ivon.merge.sweep import main_metric, sweep
    from hf_ivon.merge.vocabulary import united_tokenizer

    batches = {}
    for name, file in files.items():
        model, tokenizer = load_checkpoint(source_of(plan, name).directory)  # whose classes the labels are
        if plan.added_tokens is not None:
            pad, tokenizer = tokenizer.pad_token, united_tokenizer(plan.models)
            tokenizer.pad_token = pad
        batches[name] = load_batches(file, model, tokenizer, **columns)
    points = sweep(plan, {name: partial(evaluate, batches=b) for name, b in batches.items()}, steps=steps, scale=scale)
    for point in points:
        shown = "  ".join(f"{name} {main_metric(m)[1]:.4f}" for name, m in point["metrics"].items())
        mark = "*" if point["pareto"] else " "
        typer.echo(f"{mark} {' '.join(f'{w:.2f}' for w in point['weights'])}  {shown}")
    typer.echo("* on the Pareto front")
    return points


def _keep_sweep(points: list[dict[str, Any]], directory: Path) -> None:
    """Write a sweep's numbers and its figure beside the merge."""
    from hf_ivon.json_files import write_json
    from hf_ivon.merge.sweep import main_metric
    from hf_ivon.plots import trade_offs

    write_json(directory / "sweep.json", points)
    shown = [{name: main_metric(m) for name, m in point["metrics"].items()} for point in points]
    values = [{f"{name} ({metric})": value for name, (metric, value) in point.items()} for point in shown]
    try:
        trade_offs(values, [point["pareto"] for point in points], directory / "sweep.png")
    except ImportError:
        typer.echo("No figure was drawn: it needs matplotlib, pip install 'hf_ivon[plots]'.")


def _show(report: dict[str, Any], output_dir: Path, dry_run: bool) -> None:
    size = report["num_bytes"] / 2**20
    what = "would be merged" if dry_run else f"merged into {output_dir}"
    parts = f"{report['num_merged']} of {report['num_tensors']} tensors ({size:.1f} MiB)"
    if report["products"] is not None:
        parts = f"The products of {len(report['models'])} adapters ({report['products']})"
    typer.echo(f"{parts} {what} by {report['method']}.")
    for name, key in (
        ("without posterior", "without_posterior"),
        ("dropped", "dropped"),
        ("kept", "kept"),
        ("heads", "separate"),
    ):
        if report[key]:
            listed = list(report[key])
            typer.echo(f"{name}: {', '.join(listed[:5])}{' ...' if len(listed) > 5 else ''} ({len(listed)})")
    merged = [t for t in report.get("tensors", {}).values() if "shares" in t]
    if merged:
        for i, model in enumerate(report["models"]):
            share = sum(t["shares"][i] for t in merged) / len(merged)
            typer.echo(f"{share:6.1%}  {model}")
        distance = max(t["distance_from_average"] for t in merged)
        typer.echo(f"Farthest tensor from plain averaging: {distance:.1%} of the models' spread.")
    for note in report.get("notes", []):
        typer.echo(f"note: {note}")
