"""`hf-ivon run`: a script or module, as `python` would run it, in which `--optim ivon` works."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

# What follows the script is the script's, `--help` and `-m` too.
CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}


def run(
    command: Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="The script, and its arguments.")],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as for `python -m`.")] = False,
) -> None:
    """Run a script that uses a Trainer, unchanged, so that it takes `--optim ivon` and saves the posterior.

    For several processes: `torchrun --nproc_per_node 2 -m hf_ivon run SCRIPT ...`.
    """
    import hf_ivon.auto  # noqa: F401

    target, *arguments = command
    if not module and not Path(target).is_file():
        raise typer.BadParameter(f"The script {target!r} does not exist. For a module, pass `-m` before its name.")
    sys.argv = [target, *arguments]
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
