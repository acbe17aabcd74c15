"""`hf-ivon push`: a checkpoint with its posterior and its card onto the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory: the model and its posterior.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, NAME or USER/NAME; made if it does not exist.")],
    license: Annotated[
        str | None, typer.Option(help="Such as apache-2.0; by default the one in the directory's README.")
    ] = None,
    commit_message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model and posterior",
    revision: Annotated[str | None, typer.Option(help="Branch; by default main.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; by default the account's setting.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
) -> None:
    """Upload a checkpoint: the mean, the posterior and a card, in one commit. Exits with 2 if that fails.

    Metrics in the directory's results.json and figures, as `hf-ivon evaluate --output DIR/results.json --plots DIR`
    writes them, are in the card. Its README.md is completed; what others wrote there is kept.
    """
    from hf_ivon.hub import push as upload

    options = {"commit_message": commit_message, "private": private, "revision": revision, "create_pr": create_pr}
    try:
        done = upload(directory, repo_id, license=license, **options)
    except (ValueError, OSError, RuntimeError) as err:  # the two last from the Hub's client
        typer.echo(f"error: {err}", err=True)
        if not isinstance(err, ValueError):
            typer.echo(f"No file on the Hub was changed, and {directory} is complete: push again.", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"Pushed: {done.pr_url or done.commit_url}")
