"""`hf-ivon curvature`: a posterior for a model that was trained some other way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_ivon.cli.outputs import FAILURES, check_directory

if TYPE_CHECKING:
    from torch import nn


def curvature(
    model: Annotated[str, typer.Argument(help="Directory of a model or an adapter, with its tokenizer.")],
    data: Annotated[Path, typer.Option(help="Examples it was trained on: json, jsonl, csv or txt, also .gz.")],
    estimator: Annotated[str, typer.Option(help="squared-gradient or ggn.")] = "squared-gradient",
    fraction: Annotated[float, typer.Option(help="Share of the examples to look at, in (0, 1].")] = 1.0,
    text_columns: Annotated[
        list[str] | None, typer.Option(help="Columns that hold text, one or two; all that do by default.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens at which a text is cut.")] = 128,
    train_size: Annotated[
        int | None, typer.Option(min=1, help="Examples (tokens) of training; all in the data by default.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Prior precision per example.")] = 1e-5,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the posterior goes; beside the model by default, if it has none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of examples, and of the drawn labels.")] = 0,
) -> None:
    """Estimate the curvature of a trained model's loss on data, and write it as its posterior. Exits with 2 on errors.

    The model can then be merged, sampled and inspected like one that was trained with IVON.
    """
    try:
        num = run(
            model, data, estimator, fraction, text_columns, max_length, train_size, weight_decay, output_dir, seed
        )
    except FAILURES as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"Posterior of {num:,} examples written into {output_dir or model}.")


def run(
    model_name: str,
    file: Path,
    estimator: str,
    fraction: float,
    text_columns: list[str] | None,
    max_length: int,
    train_size: int | None,
    weight_decay: float,
    output_dir: Path | None,
    seed: int,
) -> int:
    """Estimate and save; return the number of examples that were looked at."""
    from hf_ivon.checkpoint import posterior_files, save_posterior
    from hf_ivon.curvature import check_settings, estimate_posterior
    from hf_ivon.data import load_batches, load_checkpoint, load_rows

    check_settings(estimator, weight_decay)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction}. 1 looks at all examples.")
    target = output_dir or Path(model_name)
    if output_dir is None and not target.is_dir():
        raise ValueError(f"`output_dir` must be given for a model on the Hub, got {model_name!r}. Add --output-dir.")
    if posterior_files(target):
        raise ValueError(f"{str(target)!r} has a posterior, which would be lost. Choose another --output-dir.")
    check_directory("output_dir", target)
    rows = load_rows(file, text_columns or ())
    wanted = math.ceil(fraction * len(rows))
    model, tokenizer = load_checkpoint(model_name)
    _check_mean(model, model_name)
    columns = {"text_columns": text_columns or (), "max_length": max_length}
    batches = load_batches(rows, model, tokenizer, **columns, max_examples=wanted, seed=seed)
    examples = sum(len(batch["input_ids"]) for batch in batches)
    settings = {"estimator": estimator, "weight_decay": weight_decay, "seed": seed}
    posterior = estimate_posterior(model, batches, **settings, train_size=train_size, scale=len(rows) / wanted)
    save_posterior(posterior, target)
    return examples


def _check_mean(model: nn.Module, name: str) -> None:
    """Make sure that a model was loaded with the bytes of its file, by which its posterior is known to be its own."""
    from hf_ivon.mean import mean_digest, posterior_keys
    from hf_ivon.tensor_files import TensorFiles

    is_adapter = (Path(name) / "adapter_config.json").is_file()
    saved = TensorFiles(Path(name), "adapter_model" if is_adapter else "model", [])
    params = {n: p for n, p in posterior_keys(model).items() if p.requires_grad}
    # Of some models the file has other names, and of a model on the Hub there is no file here.
    if not params.keys() <= saved.keys() or mean_digest(params) == mean_digest(saved, params):
        return
    other = next((n for n, p in params.items() if p.dtype != saved.entries[n].dtype), None)
    advice = (
        "Save the adapter in float32, which it is loaded in."
        if is_adapter
        else "Set `dtype` in config.json to what the file has, or save the model again."
    )
    reason = (
        f": `{other}` is {saved.entries[other].dtype} there and was loaded as {params[other].dtype}" if other else ""
    )
    raise ValueError(f"The weights of {name!r} must be loaded as they are in its file, but differ{reason}. {advice}")
