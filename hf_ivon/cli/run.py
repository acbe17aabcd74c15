"""`hf-ivon run`: a script or module, as `python` would run it, in which `--optim ivon` works."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import TracebackType
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
    sys.path.insert(0, os.getcwd() if module else str(Path(target).resolve().parent))
    try:
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    except (Exception, KeyboardInterrupt) as error:  # the command line's own handler would hide some of them
        error = error.with_traceback(_of_the_script(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None


def _of_the_script(traceback: TracebackType | None) -> TracebackType | None:
    """Leave out the frames before the script's first one; None if it did not get that far."""
    first = traceback
    while first is not None and first.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        first = first.tb_next
    return first
