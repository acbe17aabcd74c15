"""`hf-ivon convert`: a posterior out of a Hessian that others saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_ivon.cli.outputs import FAILURES, check_directory


def convert(
    source: Annotated[
        Path, typer.Argument(help="Model directory that holds the Hessian; or a pickle: optimizer.pt, or a flat one.")
    ],
    model: Annotated[
        Path | None, typer.Option(help="Directory of the model or adapter; by default the one that holds SOURCE.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the posterior goes; beside the model by default, if it has none.")
    ] = None,
    ess: Annotated[
        float | None, typer.Option(help="Effective sample size; by default SOURCE's, or the number of examples.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Prior precision per example; by default SOURCE's, or 1e-5.")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Number of training examples.")] = None,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Label tokens, where the loss averages over them.")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Factor that makes the Hessian that of the loss per example: 1/N for a sum.")
    ] = 1.0,
    estimator: Annotated[
        str | None, typer.Option(help="What made the Hessian, such as squared-gradient; kept in the configuration.")
    ] = None,
    trust_pickle: Annotated[
        bool,
        typer.Option("--trust-pickle", help="Open a pickle, which its maker could have made to run code; see README."),
    ] = False,
) -> None:
    """Make a posterior out of a Hessian saved by other code, for merging, sampling and `hf-ivon push`.

    Exits with 2 if it does not fit the model.
    """
    from hf_ivon import convert as converting
    from hf_ivon.checkpoint import posterior_files, save_posterior
    from hf_ivon.data import load_model

    directory = model or source.resolve().parent
    target = output_dir or directory
    known = {"ess": ess, "weight_decay": weight_decay, "num_examples": num_examples, "num_tokens": num_tokens}
    try:
        if posterior_files(target):
            raise ValueError(f"{str(target)!r} has a posterior, which would be lost. Choose another --output-dir.")
        check_directory("output_dir", target)
        posterior = converting.convert(
            source, load_model(directory), **known, scale=scale, estimator=estimator, trust_pickle=trust_pickle
        )
        save_posterior(posterior, target)
    except FAILURES as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(2) from None
    weights = sum(v.numel() for v in posterior.variance.values())
    typer.echo(f"Posterior of {weights:,} weights in {len(posterior.names())} tensors written into {target}.")
