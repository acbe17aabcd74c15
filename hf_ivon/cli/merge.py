"""`hf-ivon merge`: several finetuned models into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_LISTS = ("--models", "--weights")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def spread(arguments: Sequence[str]) -> list[str]:
    """Return `--models A B` as `--models A --models B`, which is what the parser knows.

    Args:
        arguments: The command line after the command's name.
    """
    result, option = [], None
    for argument in arguments:
        if argument.startswith("--"):
            option = argument if argument in _LISTS else None
            result += [] if option else [argument]
        else:
            result += [option, argument] if option else [argument]
    return result


def merge(
    models: Annotated[list[str], typer.Option(help="Directories or repositories on the Hub: --models A B C.")],
    output_dir: Annotated[Path, typer.Option(help="Where the merge goes; must be empty or new.")],
    base_model: Annotated[str | None, typer.Option(help="The model that all were finetuned from.")] = None,
    method: Annotated[
        str, typer.Option(help="uncertainty, gaussian, fisher, average, task-arithmetic, ties or dare.")
    ] = "uncertainty",
    weights: Annotated[list[float] | None, typer.Option(help="One number per model: --weights 1 0.5 2.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="For tensors that differ between the models: drop, or keep:MODEL.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of the merged weights: {', '.join(_DTYPES)}.")] = None,
    density: Annotated[float, typer.Option(help="Share of each difference that ties and dare keep.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and its problems; read no weights.")
    ] = False,
) -> None:
    """Merge finetuned models, each weight trusted as far as its posterior says. Exits with 2 if it cannot."""
    import torch

    from hf_ivon.merge import merge as run

    if dtype is not None and dtype not in _DTYPES:
        raise typer.BadParameter(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    try:
        report = run(
            models,
            output_dir,
            base_model=base_model,
            method=method,
            weights=weights or None,
            heads=heads,
            dtype=None if dtype is None else getattr(torch, dtype),
            density=density,
            seed=seed,
            dry_run=dry_run,
        )
    except ValueError as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(2) from None
    _show(report, output_dir, dry_run)


def _show(report: dict[str, Any], output_dir: Path, dry_run: bool) -> None:
    size = report["num_bytes"] / 2**20
    what = "would be merged" if dry_run else f"merged into {output_dir}"
    typer.echo(
        f"{report['num_merged']} of {report['num_tensors']} tensors ({size:.1f} MiB) {what} by {report['method']}."
    )
    for name, key in (("without posterior", "without_posterior"), ("dropped", "dropped"), ("kept", "kept")):
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
