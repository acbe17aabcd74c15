"""`hf-ivon merge`: several finetuned models into one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ivon.cli.outputs import FAILURES, check_directory

_LISTS = {
    "merge": ("--models", "--weights", "--data", "--text-columns"),
    "curvature": ("--text-columns",),
    "evaluate": ("--text-columns", "--ood-text-columns"),
    "sensitivity": ("--text-columns",),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def spread(arguments: Sequence[str]) -> list[str]:
    """Return `--models A B` as `--models A --models B`, which is what the parser knows.

    Args:
        arguments: The command's name, and what follows it.
    """
    lists = _LISTS.get(arguments[0], ()) if arguments else ()
    result: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, _ = argument.partition("=")
            option = name if name in lists else None
            result += [] if option and not equals else [argument]
        else:
            result += [option, argument] if option else [argument]
    return result


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
    scale: Annotated[float, typer.Option(help="What the weights of a sweep add up to.")] = 1.0,
    data: Annotated[
        list[str] | None, typer.Option(help="Labelled rows for a sweep: --data NAME=FILE NAME=FILE.")
    ] = None,
    text_columns: Annotated[list[str] | None, typer.Option(help="Columns of the data that hold text.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens at which a text is cut.")] = 128,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and its problems; read no weights.")
    ] = False,
) -> None:
    """Merge finetuned models, each weight trusted as far as its posterior says. Exits with 2 if it cannot."""
    import torch

    from hf_ivon.merge import merge as run

    if dtype is not None and dtype not in _DTYPES:
        raise typer.BadParameter(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    rule: dict[str, Any] = {"base_model": base_model, "method": method, "heads": heads, "density": density}
    rule["base_hessian"] = base_hessian
    try:
        chosen, largest = _numbers(weights), _bytes(max_shard_size)
        points = None
        if not dry_run:
            check_directory("output_dir", output_dir)
        if sweep is not None and not dry_run:
            if adapters is not None or into_base:
                raise ValueError("`adapters` and `into_base` must be left out in a sweep, which is of whole models.")
            settings = {**rule, "tokenizer": tokenizer, "seed": seed}
            points = _sweep(models, output_dir, settings, sweep, scale, data or [], text_columns or [], max_length)
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


def _sweep(
    models: list[str],
    output_dir: Path,
    settings: dict[str, Any],
    steps: int,
    scale: float,
    data: Sequence[str],
    text_columns: Sequence[str],
    max_length: int,
) -> list[dict[str, Any]]:
    """Evaluate merges along a grid, print a table, and return the points."""
    from functools import partial

    from hf_ivon.data import evaluate, load_batches, load_checkpoint
    from hf_ivon.merge.plan import make_plan
    from hf_ivon.merge.sweep import check_plan, main_metric, sweep
    from hf_ivon.merge.vocabulary import united_tokenizer

    files = dict(item.partition("=")[::2] for item in data)
    if not files or not all(files.values()):
        raise ValueError(f"`data` must be given for a sweep as NAME=FILE, got {' '.join(data) or 'none'}.")
    plan = make_plan(models, output_dir=output_dir, **settings)
    check_plan(plan)
    model, tokenizer = load_checkpoint(plan.models[0].directory)
    if plan.added_tokens is not None:
        pad, tokenizer = tokenizer.pad_token, united_tokenizer(plan.models)
        tokenizer.pad_token = pad
    columns = {"text_columns": text_columns, "max_length": max_length}
    batches = {name: load_batches(file, model, tokenizer, **columns) for name, file in files.items()}
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
    typer.echo(
        f"{report['num_merged']} of {report['num_tensors']} tensors ({size:.1f} MiB) {what} by {report['method']}."
    )
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
