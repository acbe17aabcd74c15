"""How an optimizer step grows with the work: weights, micro-batches, Monte-Carlo samples, processes.

    python recipes/benchmark_growth.py --output_dir growth
    python recipes/benchmark_growth.py --output_dir growth --weights 1 16 256 1024 --device cuda

Each is varied while the others stay at their least. Times are medians of rounds in which all sizes take turns, of the
optimizer's own work (gradients are given), beside fused AdamW where it does the same. A straight line is fitted to
each; where work costs what it should, its share of explained variance is near 1. `growth.png` shows points and lines.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

try:
    from recipes import common, timing
except ImportError:  # run as a script: this directory is on the path
    import common
    import timing

MILLION = 2**20
UNITS = {
    "weights": "million weights",
    "micro-batches": "micro-batches a step",
    "samples": "Monte-Carlo samples a step",
    "processes": "processes",
}


class Averaged(timing.OptimizerOnly):
    """Contexts that each zero their gradients, and are averaged."""

    def backward(self, params: list[nn.Parameter]) -> None:
        """Zero the gradients, then give each parameter its own."""
        self.optimizer.zero_grad()
        super().backward(params)


def shapes(millions: int) -> list[tuple[int, ...]]:
    """Return matrices of a million weights each."""
    return [(1024, MILLION // 1024)] * millions


def step(
    optimizer: str,
    millions: int,
    device: str,
    contexts: int = 1,
    kind: type[timing.OptimizerOnly] = timing.OptimizerOnly,
) -> timing.OptimizerOnly:
    """Return an optimizer with its parameters, ready to be timed."""
    params = timing.parameters(shapes(millions), device)
    twins = timing.parameters(shapes(millions), device) if kind is timing.OptimizerOnly else None
    return kind(timing.optimizers([optimizer])[optimizer](params), params, contexts, twins)


def medians(steps: dict[int, timing.OptimizerOnly], rounds: int) -> dict[int, float]:
    """Return the median seconds of each, of rounds in which they take turns."""
    seconds: dict[int, list[float]] = {size: [] for size in steps}
    for number in range(rounds + 2):
        for size, one in steps.items():
            found = one.run()
            if number > 1:  # the first ones compile, and fill the caches
                seconds[size].append(found)
    return {size: statistics.median(found) for size, found in seconds.items()}


def _process(rank: int, world: int, millions: int, rounds: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    one = step("ivon fused", millions, "cpu")
    seconds = medians({world: one}, rounds)[world]
    if rank == 0:
        Path(directory, "seconds").write_text(str(seconds), encoding="utf-8")
    dist.destroy_process_group()


def of_processes(world: int, millions: int, rounds: int) -> float:
    """Return the median seconds of a step in several processes, which average their curvatures."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_process, (world, millions, rounds, directory), nprocs=world)
        return float(Path(directory, "seconds").read_text(encoding="utf-8"))


def line(points: dict[int, float]) -> tuple[float, float, float]:
    """Return slope, intercept and share of explained variance of the least-squares line."""
    x, y = (torch.tensor(list(v), dtype=torch.float64) for v in (points.keys(), points.values()))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    intercept = float(y.mean()) - slope * float(x.mean())
    left, whole = (y - slope * x - intercept).square().sum(), (y - y.mean()).square().sum()
    return slope, intercept, float(1 - left / whole) if whole > 0 else 1.0


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[int, float]]]:
    """Return seconds by what is varied, optimizer and size."""
    least = options.weights[0]

    def growing(make: Callable[[int], timing.OptimizerOnly], sizes: list[int]) -> dict[int, float]:
        return medians({size: make(size) for size in sizes}, options.rounds)

    found: dict[str, dict[str, dict[int, float]]] = {"weights": {}}
    for name in ("ivon fused", "adamw fused"):
        found["weights"][name] = growing(lambda n, name=name: step(name, n, options.device), options.weights)
    for what, kind, sizes in (
        ("micro-batches", timing.OptimizerOnly, options.micro_batches),
        ("samples", Averaged, options.samples),
    ):
        times = growing(lambda n, kind=kind: step("ivon fused", least, options.device, n, kind), sizes)
        found[what] = {"ivon fused": times}
    if options.device == "cpu":
        times = {world: of_processes(world, least, options.rounds) for world in options.processes}
        found["processes"] = {"ivon fused": times}
    return found


def draw(found: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Draw points and fitted lines, a panel for each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(found), 3.4), layout="constrained", facecolor="white")
    for axes, (what, by_optimizer) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for colour, marker, (name, points) in zip(("#0072b2", "#d55e00"), "os", by_optimizer.items(), strict=False):
            slope, intercept, _ = line(points)
            ends = [min(points), max(points)]
            axes.plot(list(points), [s * 1e3 for s in points.values()], marker, color=colour, label=name)
            axes.plot(ends, [(slope * n + intercept) * 1e3 for n in ends], color=colour, linewidth=1.0)
        axes.set_xticks(list(next(iter(by_optimizer.values()))))
        axes.set_xlabel(UNITS[what])
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.set_ylabel("Optimizer's own time of a step (ms)")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[int, float]]]:
    """Run the benchmark, write `results.json` and `growth.png`, and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--weights", type=int, nargs="+", default=[1, 4, 16, 64], help="millions of weights")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="on a CPU, one thread each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    found = measure(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    common.write_results(str(options.output_dir), found)
    draw(found, options.output_dir / "growth.png")
    rows = []
    for what, by_optimizer in found.items():
        for name, points in by_optimizer.items():
            slope, intercept, explained = line(points)
            times = ", ".join(f"{size}: {seconds * 1e3:.1f}" for size, seconds in points.items())
            rows.append([UNITS[what], name, times, slope * 1e3, intercept * 1e3, explained])
    print(common.table(rows, ["", "optimizer", "ms", "ms for one more", "ms for none", "explained"]))
    return found


if __name__ == "__main__":
    common.main_guard(main)
