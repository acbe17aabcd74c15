"""Time and memory of an optimizer step: IVON in its three ways, torch's AdamW, and the authors' IVON if installed.

Every measurement is taken in rounds in which all the optimizers take turns, and the median is reported, with its ratio
to fused AdamW. Beside them stand two floors: copying the bytes that a step must move at the measured speed of a copy,
and one `torch.randn` of the model's size.

    python recipes/benchmark_optimizer.py --output_dir bench --models gpt2 minilm tiny lora
    python recipes/benchmark_optimizer.py --output_dir bench --models gpt2 minilm lora --whole_step --rounds 3
    python recipes/benchmark_optimizer.py --output_dir bench --whole_step --bf16 --memory --batch_size 12 \\
        --block_size 1024   # on a GPU; --contexts 8

`results.json`, `table.md` and, if matplotlib is installed, `bench.png` are written into the output directory. Whole
steps are forward, backward and step of GPT-2, of MiniLM as a classifier, and of GPT-2 with LoRA of rank 8. On a GPU
the table also has the kernels of a step and the time that they take; that of the floor by it is the share of the
memory's bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import platform
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

try:
    from recipes import common, timing
except ImportError:  # run as a script: this directory is on the path
    import common
    import timing

# Bytes that must be moved per weight: the step of AdamW, and IVON's three passes. An optimizer that keeps its weight
# sample from one step to the next could do with 36.
BYTES = {"adamw": 28, "ivon": 20 + 20 + 32, "ivon, low memory": 12 + 20 + 24}


def traced(work: Callable[[], object]) -> tuple[int, float]:
    """Return how many kernels, copies and fills a call has a GPU run, and the seconds that they take together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [
        event
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e6


def device_work(step: timing.OptimizerOnly | timing.WholeStep) -> tuple[int, float]:
    """Return what `traced` does of a step, without the stand-in for the backward pass."""
    count, seconds = traced(step.run)
    if isinstance(step, timing.OptimizerOnly):
        for params in (step.params, step.twins):
            for p in params or ():
                p.grad = None
            for _ in range(step.contexts if params else 0):
                without = traced(lambda params=params: step.backward(params))
                count, seconds = count - without[0], seconds - without[1]
    return count, seconds


def memory(name: str, optimizer: str, options: argparse.Namespace) -> float:
    """Return the most memory that an optimizer takes beside weights and gradients, in sizes of the model.

    On a CPU it is the resident memory of a process of its own, on CUDA the allocator's peak; there a whole step's has
    weights, gradients and activations in it.
    """
    size = 4 * sum(torch.Size(shape).numel() for shape in timing.SHAPES[name]())
    if options.device != "cpu":
        gc.collect()
        before = torch.cuda.memory_allocated()
        step = timing.make_step(name, timing.optimizers([optimizer])[optimizer], options)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step.run()
        others = 0 if options.whole_step else 3 * size  # weights, given gradients, their copies
        return (torch.cuda.max_memory_allocated() - before - others) / size
    with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, name, optimizer, options.contexts).result() / size


def _resident(model: str, optimizer: str, contexts: int) -> int:
    params = timing.parameters(timing.SHAPES[model](), "cpu")
    step = timing.OptimizerOnly(timing.optimizers([optimizer])[optimizer](params), params, contexts)
    step.backward(params)
    before = _status("VmRSS")
    for number in range(3):
        if number == 1:  # the first step compiles; what it takes for that is not the optimizer's
            Path("/proc/self/clear_refs").write_text("5")
        step.run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(name: str, options: argparse.Namespace) -> Iterator[dict]:
    """Yield one row for each optimizer: median seconds of a step, and the ratio to fused AdamW in the same rounds."""
    steps, first, on_device = {}, {}, {}
    for key, make in timing.optimizers(options.optimizers).items():
        steps[key] = timing.make_step(name, make, options, with_twins=True)
        first[key] = timing.timed(steps[key].run, options.device)
        steps[key].run()
        on_device[key] = (None, None) if options.device == "cpu" else device_work(steps[key])
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(options.rounds):
        for key, step in steps.items():
            gc.collect()
            seconds[key].append(step.run())
    total = sum(torch.Size(shape).numel() for shape in timing.SHAPES[name]())
    del steps
    for key, values in seconds.items():
        ratios = (
            [a / b for a, b in zip(values, seconds["adamw fused"], strict=True)] if "adamw fused" in seconds else []
        )
        yield {
            "model": name,
            "what": "whole step" if options.whole_step else "optimizer",
            "optimizer": key,
            "contexts": options.contexts,
            "first_step_s": first[key],
            "median_ms": statistics.median(values) * 1e3,
            "ns_per_weight": statistics.median(values) / total * 1e9,
            "to_fused_adamw": statistics.median(ratios) if ratios else None,
            "memory_copies": memory(name, key, options) if options.memory else None,
            "kernels": on_device[key][0],
            "device_ms": None if on_device[key][1] is None else on_device[key][1] * 1e3,
        }


def floors(name: str, options: argparse.Namespace) -> Iterator[dict]:
    """Yield the time of copying the bytes that a step must move, and of one `torch.randn` of the model's size."""
    total = sum(torch.Size(shape).numel() for shape in timing.SHAPES[name]())
    source = torch.zeros(total, device=options.device)
    target = torch.zeros_like(source)
    copy = statistics.median(timing.timed(lambda: target.copy_(source), options.device) for _ in range(options.rounds))
    randn = statistics.median(timing.timed(lambda: target.normal_(), options.device) for _ in range(options.rounds))
    rows: dict[str, float] = {f"floor {key}": copy * size / 8 for key, size in BYTES.items()}
    for key, value in {**rows, "torch.randn": randn}.items():
        yield {"model": name, "what": "optimizer", "optimizer": key, "median_ms": value * 1e3}


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table; what no row has is left out."""
    columns = {"median_ms": "ms", "to_fused_adamw": "to fused AdamW", "first_step_s": "first step, s"}
    columns |= {"memory_copies": "memory, copies", "kernels": "kernels", "device_ms": "ms of the GPU"}
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = [f"| model | what | optimizer | {' | '.join(columns[key] for key in shown)} |"]
    lines.append("|" + "---|" * (3 + len(shown)))
    for row in rows:
        cells = [row.get(key) for key in shown]
        values = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {row['model']} | {row['what']} | {row['optimizer']} | {' | '.join(values)} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Draw how long each optimizer takes, one axes for each model, fused AdamW and the floors among them."""
    from hf_ivon.plots.axes import INK, STYLES, new_figure, save

    models = list(dict.fromkeys(row["model"] for row in rows))
    most = max(sum(row["model"] == model for row in rows) for model in models)
    figure, all_axes = new_figure(width=7.0, height=0.6 + len(models) * (0.8 + 0.22 * most), rows=len(models))
    for axes, model in zip(all_axes, models, strict=True):
        of_model = [row for row in rows if row["model"] == model][::-1]
        colours = [STYLES["ivon" in row["optimizer"]][0] for row in of_model]
        for place, (row, colour) in enumerate(zip(of_model, colours, strict=True)):
            axes.plot(row["median_ms"], place, "o", color=colour)
            if (ratio := row.get("to_fused_adamw")) is not None:
                where = {"xytext": (7, -3), "textcoords": "offset points", "color": INK, "fontsize": 8}
                axes.annotate(f"{ratio:.2f}", (row["median_ms"], place), **where)
        axes.set_yticks(range(len(of_model)), [row["optimizer"] for row in of_model])
        axes.set_xscale("log")
        axes.set_title(f"{model}, {rows[0]['what']}: ms, and the ratio to fused AdamW", loc="left", color=INK)
        axes.tick_params(labelbottom=True)
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the table goes, as JSON and Markdown")
    parser.add_argument("--models", nargs="+", choices=sorted(timing.SHAPES), default=["gpt2"])
    parser.add_argument("--optimizers", nargs="+", default=[], help="names as in the table; all if not given")
    parser.add_argument("--contexts", type=int, default=1, help="micro-batches of a step, each with its own sample")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; the median is reported")
    parser.add_argument("--whole_step", action="store_true", help="forward and backward too")
    parser.add_argument("--batch_size", type=int, default=4, help="texts in a micro-batch of a whole step")
    parser.add_argument("--block_size", type=int, default=256, help="tokens in each")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 in the whole step")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.whole_step and (other := [name for name in options.models if name not in timing.WHOLE]):
        parser.error(
            f"`--whole_step` is measured with {', '.join(timing.WHOLE)}, got {other[0]}. Take it out of `--models`."
        )
    logging.basicConfig(level=logging.WARNING)
    rows: list[dict] = []
    for name in options.models:
        rows += measure(name, options)
        if not options.whole_step:
            rows += floors(name, options)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    common.write_results(str(options.output_dir), {"machine": machine, "rows": rows})
    (options.output_dir / "table.md").write_text(table(rows) + "\n")
    if importlib.util.find_spec("matplotlib"):
        draw(rows, options.output_dir / "bench.png")
    print(table(rows))
    print(json.dumps(machine))


if __name__ == "__main__":
    main()
