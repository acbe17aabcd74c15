"""Time and memory of an optimizer step: IVON in its three ways, torch's AdamW, and the authors' IVON if installed.

Every measurement is taken in rounds in which all the optimizers take turns, and the median is reported, with its ratio
to fused AdamW. Beside them stand two floors: copying the bytes that a step must move at the measured speed of a copy,
and one `torch.randn` of the model's size.

    python recipes/benchmark_optimizer.py --output_dir bench --models gpt2 minilm tiny lora
    python recipes/benchmark_optimizer.py --output_dir bench --models gpt2 minilm lora --whole_step --rounds 3

`results.json`, `table.md` and, if matplotlib is installed, `bench.png` are written into the output directory. Whole
steps are forward, backward and step of GPT-2, of MiniLM as a classifier, and of GPT-2 with LoRA of rank 8.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from common import write_results

from hf_ivon import IVON

# Bytes that must be moved per weight: the step of AdamW, and IVON's three passes. An optimizer that keeps its weight
# sample from one step to the next could do with 36.
BYTES = {"adamw": 28, "ivon": 20 + 20 + 32, "ivon, low memory": 12 + 20 + 24}
LOCAL = {"lr": 1e-3, "ess": 1e6, "hess_init": 0.1, "clip_radius": 1e-3}
# As the presets for finetuning have it: another estimator, and a prior at the start.
FISHER = {"hess_approx": "fisher", "batch_size": 16, "beta2": 0.98, "prior_mean": "init"}


def gpt2_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's 148 tensors, 124 million weights."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def minilm_shapes() -> list[tuple[int, ...]]:
    """Return the shapes of MiniLM's 103 tensors, 23 million weights."""
    layer = [shape for _ in range(4) for shape in ((384, 384), (384,))] + [(384,), (384,)]
    layer += [(1536, 384), (1536,), (384, 1536), (384,), (384,), (384,)]
    return [(30522, 384), (512, 384), (2, 384), (384,), (384,), *layer * 6, (384, 384), (384,)]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "gpt2": gpt2_shapes,
    "minilm": minilm_shapes,
    "tiny": lambda: [(370,)] * 2000,
    "lora": lambda: [(8, 768), (2304, 8)] * 12,
}


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Return parameters of these shapes with small random values."""
    generator = torch.Generator(device).manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, device=device) * 0.02) for s in shapes]


def optimizers(names: list[str]) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Return how each optimizer is made; the authors' only if it is installed."""
    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "adamw fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "adamw foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "ivon fused": lambda params: IVON(params, fused=True, **LOCAL),
        "ivon fused, fisher": lambda params: IVON(params, fused=True, **LOCAL, **FISHER),
        "ivon fused, bf16 momentum": lambda params: IVON(params, fused=True, momentum_dtype="bfloat16", **LOCAL),
        "ivon fused, low memory": lambda params: IVON(params, fused=True, low_memory=True, **LOCAL),
        "ivon foreach": lambda params: IVON(params, fused=False, **LOCAL),
        "ivon plain": lambda params: IVON(params, fused=False, foreach=False, **LOCAL),
    }
    if importlib.util.find_spec("ivon"):
        authors = importlib.import_module("ivon").IVON
        made["ivon-opt"] = lambda params: authors(params, **LOCAL)
    return {name: make for name, make in made.items() if not names or name in names}


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


class OptimizerOnly:
    """The optimizer's own work in a step: gradients are given, and written as a backward pass would.

    Args:
        optimizer: Of the parameters.
        params: The parameters.
        contexts: Micro-batches of a step.
        twins: Parameters alike, of no optimizer. By how much the backward pass takes longer with the optimizer's hooks
            than with these counts as its work too.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        contexts: int,
        twins: list[nn.Parameter] | None = None,
    ) -> None:
        self.optimizer, self.params, self.contexts, self.twins = optimizer, params, contexts, twins
        self.grads = [torch.full_like(p, 1e-3) for p in params]
        self.sampled = hasattr(optimizer, "sampled_params")

    def run(self) -> float:
        """Run one step; returns its seconds without those of the stand-in for the backward pass."""
        device = self.params[0].device.type
        seconds = 0.0
        for p in [*self.params, *(self.twins or [])]:
            p.grad = None
        for _ in range(self.contexts):
            if not self.sampled:
                self.backward(self.params)
                continue
            context = self.optimizer.sampled_params(train=True)  # type: ignore[attr-defined]
            seconds += timed(context.__enter__, device)
            hooked = timed(lambda: self.backward(self.params), device)
            if self.twins is not None:
                seconds += hooked - timed(lambda: self.backward(self.twins), device)
            seconds += timed(lambda context=context: context.__exit__(None, None, None), device)
        return seconds + timed(self.optimizer.step, device)

    def backward(self, params: list[nn.Parameter]) -> None:
        """Give each parameter its gradient through autograd, so that hooks see it."""
        torch.autograd.backward(params, self.grads)


class WholeStep:
    """Forward, backward and step of a model."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, contexts: int, options: argparse.Namespace):
        from contextlib import nullcontext

        self.optimizer, self.model, self.contexts = optimizer, model, contexts
        self.device = next(model.parameters()).device.type
        self.bf16 = options.bf16
        config: Any = model.config
        shape = (options.batch_size, options.block_size)
        tokens = torch.randint(0, config.vocab_size, shape, device=self.device)
        is_classifier = config.model_type == "bert"
        self.batch = {"input_ids": tokens, "labels": tokens[:, 0] % 2 if is_classifier else tokens}
        self.context = getattr(optimizer, "sampled_params", lambda train: nullcontext())

    def run(self) -> float:
        """Run one step; returns its seconds."""
        return timed(self._step, self.device)

    def _step(self) -> None:
        for _ in range(self.contexts):
            with self.context(train=True):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    loss = self.model(**self.batch).loss / self.contexts
                loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gpt2(device: str) -> nn.Module:
    """Return GPT-2 of 124 million weights, untrained, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).to(device)


def minilm(device: str) -> nn.Module:
    """Return a classifier in MiniLM's shapes, untrained, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).to(device)


def lora(device: str) -> nn.Module:
    """Return GPT-2 with LoRA of rank 8 on the attention's first projections."""
    from peft import LoraConfig, get_peft_model

    model: Any = gpt2(device)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))


WHOLE: dict[str, Callable[[str], nn.Module]] = {"gpt2": gpt2, "minilm": minilm, "lora": lora}


def memory(model: str, optimizer: str, contexts: int) -> float:
    """Return the most memory that an optimizer takes beside weights and gradients, in sizes of the model.

    On a CPU it is the resident memory of a process of its own, on CUDA the allocator's peak.
    """
    shapes = SHAPES[model]()
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    if torch.cuda.is_available():
        params = parameters(shapes, "cuda")
        step = OptimizerOnly(optimizers([optimizer])[optimizer](params), params, contexts)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step.run()
        return (torch.cuda.max_memory_allocated() - 3 * size) / size  # weights, given gradients, their copies
    with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, model, optimizer, contexts).result() / size


def _resident(model: str, optimizer: str, contexts: int) -> int:
    params = parameters(SHAPES[model](), "cpu")
    step = OptimizerOnly(optimizers([optimizer])[optimizer](params), params, contexts)
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
    device = options.device
    steps, first = {}, {}
    made = optimizers(options.optimizers)
    for optimizer_name, make in made.items():
        if options.whole_step:
            model = WHOLE[name](device)
            trained = make([p for p in model.parameters() if p.requires_grad])
            steps[optimizer_name] = WholeStep(trained, model, options.contexts, options)
        else:
            params = parameters(SHAPES[name](), device)
            trained = make(params)
            twins = parameters(SHAPES[name](), device) if hasattr(trained, "sampled_params") else None
            steps[optimizer_name] = OptimizerOnly(trained, params, options.contexts, twins)
        first[optimizer_name] = timed(steps[optimizer_name].run, device)
        steps[optimizer_name].run()
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(options.rounds):
        for key, step in steps.items():
            gc.collect()
            seconds[key].append(step.run())
    total = sum(torch.Size(shape).numel() for shape in SHAPES[name]())
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
            "memory_copies": memory(name, key, options.contexts) if options.memory else None,
        }


def floors(name: str, options: argparse.Namespace) -> Iterator[dict]:
    """Yield the time of copying the bytes that a step must move, and of one `torch.randn` of the model's size."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES[name]())
    source = torch.zeros(total, device=options.device)
    target = torch.zeros_like(source)
    copy = statistics.median(timed(lambda: target.copy_(source), options.device) for _ in range(options.rounds))
    randn = statistics.median(timed(lambda: target.normal_(), options.device) for _ in range(options.rounds))
    rows: dict[str, float] = {f"floor {key}": copy * size / 8 for key, size in BYTES.items()}
    for key, value in {**rows, "torch.randn": randn}.items():
        yield {"model": name, "what": "optimizer", "optimizer": key, "median_ms": value * 1e3}


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| model | what | optimizer | ms | to fused AdamW | first step, s | memory, copies |", "|" + "---|" * 7]
    for row in rows:
        cells: list[Tensor | str | float | None] = [row["median_ms"], row.get("to_fused_adamw")]
        cells += [row.get("first_step_s"), row.get("memory_copies")]
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append(f"| {row['model']} | {row['what']} | {row['optimizer']} | {' | '.join(shown)} |")
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
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["gpt2"])
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
    if options.whole_step and (other := [name for name in options.models if name not in WHOLE]):
        parser.error(f"`--whole_step` is measured with {', '.join(WHOLE)}, got {other[0]}. Take it out of `--models`.")
    logging.basicConfig(level=logging.WARNING)
    rows: list[dict] = []
    for name in options.models:
        rows += measure(name, options)
        if not options.whole_step:
            rows += floors(name, options)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_results(str(options.output_dir), {"machine": machine, "rows": rows})
    (options.output_dir / "table.md").write_text(table(rows) + "\n")
    if importlib.util.find_spec("matplotlib"):
        draw(rows, options.output_dir / "bench.png")
    print(table(rows))
    print(json.dumps(machine))


if __name__ == "__main__":
    main()
