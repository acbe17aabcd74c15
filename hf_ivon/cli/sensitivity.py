"""`hf-ivon sensitivity`: what a checkpoint owes to each training example, and how it does on examples left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ivon.cli.outputs import FAILURES, check_outputs, writing

_WIDTH = 72  # characters of a text that are shown


def sensitivity(
    model: Annotated[str, typer.Argument(help="Directory of a model or an adapter with its posterior and tokenizer.")],
    data: Annotated[Path, typer.Option(help="Examples it was trained on: json, jsonl, csv or txt, also .gz.")],
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Look at a random choice of so many; all by default.")
    ] = None,
    text_columns: Annotated[
        list[str] | None, typer.Option(help="Columns that hold text, one or two; all that do by default.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens at which a text is cut.")] = 128,
    ess_scale: Annotated[
        float, typer.Option(help="Factor on the posterior's precision: above 1 the estimated changes are smaller.")
    ] = 1.0,
    top: Annotated[int, typer.Option(min=0, help="Print so many of the examples with the highest sensitivity.")] = 10,
    output: Annotated[
        Path | None, typer.Option(help="Write one line of JSON per example, the highest sensitivity first.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for a figure: how sensitivities are spread.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of examples.")] = 0,
) -> None:
    """Estimate without validation data how a model does on new examples, and name the examples it depends on most.

    The table has the average loss on the training examples, and what it would be on each had it been left out of
    training. High sensitivities are often wrong labels. Exits with 2 on errors.
    """
    try:
        check_outputs(output, plots)
        summary, rows = run(model, data, max_examples, text_columns or [], max_length, ess_scale, seed)
    except FAILURES as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{'':<10}{'trained on':>12}{'left out':>12}   {len(rows):,} examples")
    for name in ("loss", "accuracy"):
        if name in summary:
            typer.echo(f"{name:<10}{summary[name]:>12.4f}{summary[f'loo_{name}']:>12.4f}")
    if top:
        typer.echo(f"\n{'row':>8}{'sensitivity':>13}{'loss':>9}{'left out':>10}  text")
    for row in rows[:top]:
        shown = " | ".join(row["text"]).replace("\n", " ")
        shown = shown if len(shown) <= _WIDTH else shown[: _WIDTH - 3] + "..."
        label = f"[{row['label']}] " if "label" in row else ""
        numbers = f"{row['row']:>8}{row['sensitivity']:>13.4g}{row['loss']:>9.3g}{row['loo_loss']:>10.3g}"
        typer.echo(f"{numbers}  {label}{shown}")
    with writing():
        if output is not None:
            from hf_ivon.json_files import write_json_lines

            write_json_lines(output, rows)
        if plots is not None:
            import torch

            from hf_ivon.plots import sensitivity_histogram

            scores = torch.tensor([row["sensitivity"] for row in rows], dtype=torch.float64)
            sensitivity_histogram({"training examples": scores}, plots / "sensitivity.png")


def run(
    model_name: str,
    file: Path,
    max_examples: int | None,
    text_columns: list[str],
    max_length: int,
    ess_scale: float,
    seed: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the summary, and what is known of each example, the highest sensitivity first."""
    from hf_ivon.columns import LABELS, text_columns_of
    from hf_ivon.data import best_device, load_batches, load_checkpoint, load_rows
    from hf_ivon.posterior import Posterior
    from hf_ivon.sensitivity import estimate_sensitivity

    model, tokenizer = load_checkpoint(model_name)
    posterior = Posterior.from_pretrained(model_name, model, check_values=True)
    data = load_rows(file, text_columns)
    options: dict[str, Any] = {"text_columns": text_columns, "max_length": max_length, "seed": seed}
    batches = load_batches(data, model, tokenizer, **options, max_examples=max_examples, with_rows=True)
    numbers = [int(number) for batch in batches for number in batch.pop("row")]
    model.to(best_device())
    found = estimate_sensitivity(model, posterior, batches, ess_scale=ess_scale, progress=True)
    columns, rows = text_columns_of(data, text_columns), []
    for i in found.score.argsort(descending=True, stable=True).tolist():
        example = data[numbers[i]]
        labels = [example[name] for name in LABELS if name in example]
        label = {"label": labels[0]} if labels else {}
        numeric = {"sensitivity": found.score[i], "loss": found.loss[i], "loo_loss": found.loo_loss[i]}
        row = {"row": numbers[i], **{name: float(value) for name, value in numeric.items()}}
        rows.append({**row, **label, "text": [example[column] for column in columns]})
    return found.summary(), rows
