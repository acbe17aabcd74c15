"""The `hf-ivon` command: its subcommands and what they print."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_ivon.cli import convert, curvature, evaluate, merge, push, sensitivity
from hf_ivon.cli.run import CONTEXT, run

if TYPE_CHECKING:
    from hf_ivon.posterior import Posterior

_QUANTILES = {"q01": 0.01, "q50": 0.5, "q99": 0.99}
_MOVED_BY = 0.1  # |h / hess_init - 1| from which a weight's Hessian counts as moved from its start value
_HARDLY = 0.05  # share of moved weights below which the Hessian as a whole has hardly moved
_MAX_ELEMENTS = 4_000_000  # weights that a quantile looks at, evenly spread: exact enough, and quick for large models

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command."""
    own = sys.argv[1:2] != ["run"]  # what stands behind `run` is the script's
    app(args=merge.spread(sys.argv[1:]) if own else None, prog_name="hf-ivon")


def _version(show: bool) -> None:
    if show:
        from hf_ivon import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command(context_settings=CONTEXT)(run)
app.command()(merge.merge)
app.command()(curvature.curvature)
app.command()(evaluate.evaluate)
app.command()(sensitivity.sensitivity)
app.command()(convert.convert)
app.command()(push.push)


@app.callback()
def hf_ivon(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Work with checkpoints that hold a posterior over their weights."""


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory that holds the posterior's files.")],
    tensors: Annotated[
        int, typer.Option(min=0, help="Number of tensor groups to list, largest first; 0 lists none.")
    ] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all settings in full.")] = False,
    plots: Annotated[
        Path | None,
        typer.Option(help="Directory for figures: sigma by layer, and the run, if trainer_state.json is there."),
    ] = None,
) -> None:
    """Show what a checkpoint's posterior was learnt with, how wide it is, and how far its Hessian has moved.

    Tensors whose names differ only in a layer number are one group. Exits with 2 if the files cannot be used.
    """
    from hf_ivon.checkpoint import PosteriorFormatError, load_posterior

    try:
        posterior = load_posterior(directory)
    except PosteriorFormatError as err:
        typer.echo(str(err), err=True)
        raise typer.Exit(2) from None
    summary = {"directory": str(directory), **_summary(posterior, tensors)}
    typer.echo(json.dumps(summary, indent=2) if as_json else "\n".join(_lines(summary)))
    if plots is not None:
        try:
            _draw(posterior, directory / "trainer_state.json", plots)
        except ImportError as err:
            typer.echo(f"error: {err}. Install hf_ivon[plots].", err=True)
            raise typer.Exit(2) from None
        except OSError as err:
            typer.echo(f"error: {err}", err=True)
            raise typer.Exit(2) from None


def _draw(posterior: Posterior, state: Path, directory: Path) -> None:
    from hf_ivon.json_files import read_json
    from hf_ivon.plots import posterior_curves, sigma_per_layer

    sigma_per_layer(posterior, directory / "sigma.png")
    if not state.is_file():
        return
    problems: list[str] = []
    history = (read_json(state, problems) or {}).get("log_history")
    try:
        posterior_curves(history if isinstance(history, list) else [], directory / "training.png")
    except ValueError as err:
        typer.echo(f"No training.png: {next(iter(problems), err)}", err=True)


def _summary(posterior: Posterior, num_groups: int) -> dict[str, Any]:
    """Return the settings and the statistics of a posterior as JSON types."""
    groups: dict[str, list[str]] = {}
    for name in posterior.names():
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name), []).append(name)
    listed = sorted(groups, key=lambda group: -sum(posterior.variance[name].numel() for name in groups[group]))
    overall = _statistics(posterior, posterior.names())
    is_ivon = posterior.config.estimator.startswith("ivon-")
    return {
        "config": posterior.config.to_dict(),
        **overall,
        "hess_hardly_moved": overall["hess_moved_share"] < _HARDLY if is_ivon else None,
        "num_groups": len(groups),
        "groups": [{"name": group, **_statistics(posterior, groups[group])} for group in listed[:num_groups]],
    }


def _statistics(posterior: Posterior, names: list[str]) -> dict[str, Any]:
    """Return sizes, quantiles of σ and of h / hess_init, and the share of weights whose h has moved."""
    import numpy as np
    import torch

    total = sum(posterior.variance[name].numel() for name in names)
    stride = math.ceil(total / _MAX_ELEMENTS)
    moved, sigmas, ratios = 0, [], []
    for name in names:
        ratio = posterior.hess(name).flatten() / posterior.config.of("hess_init", name)
        moved += int(((ratio - 1).abs() > _MOVED_BY).sum())
        sigmas.append(posterior.variance[name].flatten()[::stride].sqrt())
        ratios.append(ratio[::stride])
    sigma, hess_rel = (
        np.quantile(torch.cat(values).numpy(), list(_QUANTILES.values())) for values in (sigmas, ratios)
    )
    return {
        "num_tensors": len(names),
        "num_parameters": total,
        "sigma": dict(zip(_QUANTILES, sigma.tolist(), strict=True)),
        "hess_rel": dict(zip(_QUANTILES, hess_rel.tolist(), strict=True)),
        "hess_moved_share": moved / total,
    }


def _lines(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines to read."""
    from hf_ivon.posterior_config import setting_text

    config = summary["config"]
    settings = {name: setting_text(config[name]) for name in ("ess", "weight_decay", "hess_init")}
    settings |= {name: f"{config[name]:,}" for name in ("num_examples", "num_tokens") if config[name] is not None}
    settings["steps"] = f"{config['steps']:,}"
    settings["betas"] = ", ".join(f"{beta:g}" for beta in config["betas"])
    settings["estimator"] = config["estimator"]
    if config["base_model"]:
        settings["base_model"] = " ".join(filter(None, (config["base_model"], config["base_revision"])))
    settings["versions"] = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    settings["tensors"] = f"{summary['num_tensors']:,}"
    settings["parameters"] = f"{summary['num_parameters']:,}"
    lines = [f"Posterior in {summary['directory']}", ""]
    lines += [f"  {name:<14}{value}" for name, value in settings.items()]
    lines += ["", *_table([{"name": "all", **summary}, *summary["groups"]])]
    hidden = summary["num_groups"] - len(summary["groups"])
    if hidden and summary["groups"]:
        lines.append(f"  and {hidden} smaller groups (--tensors {summary['num_groups']} lists all)")
    lines += ["", "σ: standard deviation of a weight, in the weight's unit. h/h0: Hessian over hess_init."]
    lines += ["q01, q50, q99: quantiles over weights. moved: share of weights with h/h0 outside 0.9 to 1.1."]
    return lines + _verdict(summary)


def _verdict(summary: dict[str, Any]) -> list[str]:
    if summary["hess_hardly_moved"] is None:
        return []
    share = f"{summary['hess_moved_share']:.1%} of the weights have a Hessian more than 10% off `hess_init`"
    if not summary["hess_hardly_moved"]:
        return ["", f"The Hessian has moved from its start value: {share}."]
    return [
        "",
        f"The Hessian has hardly moved from its start value: only {share}.",
        "The widths are still those that training began with and say little about the data. Train longer, or start",
        "from a smaller `beta2`, or from a `hess_init` nearer to the Hessian of this model.",
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    heads = ["", "tensors", "parameters", *(f"{s} {q}" for s in ("σ", "h/h0") for q in _QUANTILES), "moved"]
    cells = [
        [
            row["name"],
            str(row["num_tensors"]),
            f"{row['num_parameters']:,}",
            *(f"{row[s][q]:.3g}" for s in ("sigma", "hess_rel") for q in _QUANTILES),
            f"{row['hess_moved_share']:.1%}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = []
    for first, *rest in [heads, *cells]:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join(["", first.ljust(widths[0]), *numbers]))
    return lines
