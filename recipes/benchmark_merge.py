"""Time and peak memory of merging large models, beside `cp` of the same bytes and, if it is installed, mergekit.

    python recipes/benchmark_merge.py --work_dir DIR                       # four models of 2.9 GiB and their base
    python recipes/benchmark_merge.py --work_dir DIR --mergekit mergekit-yaml --rounds 3

The models are random, in the layout of a Llama of 1.5 billion parameters; they are made once. Each round runs every
command once, in an order of its own, so that all see the same machine and none always finds in memory what another
has read; medians over the rounds are printed, and `results.json` is written into the work directory. Throughput
counts what is read and what is written, "to cp" compares it with that of `cp`. As `cp` writes all that it reads, and a
merge a fraction, "by input" is the time of copying the merge's input files in times of the merge's. A merge ends when
all is on the disk, and `cp` when the system has taken it: "synced" is "by input" with `cp` and a `sync` of its files.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from hf_ivon import Posterior, PosteriorConfig, save_posterior
from hf_ivon.mean import mean_digest
from hf_ivon.merge.files import Writer
from hf_ivon.tensor_files import TensorFiles

try:
    from recipes import common
except ImportError:  # run as a script: this directory is on the path
    import common

WIDTH, INNER, VOCABULARY = 2048, 5504, 32000
SYNCED = ", synced"


def layout(layers: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return a Llama's tensors."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shapes["model.norm.weight"] = (WIDTH,)
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"}
        shapes |= {f"{block}mlp.{n}_proj.weight": (INNER, WIDTH) for n in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{block}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    return {name: (torch.bfloat16, shape) for name, shape in sorted(shapes.items())}


def make_model(directory: Path, layers: int, seed: int) -> None:
    """Write a random model, unless it is there."""
    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors").unlink(missing_ok=True)  # of a run that was interrupted
    generator = torch.Generator().manual_seed(seed)
    tensors = layout(layers)
    with Writer(directory, "model", tensors, {"format": "pt"}, 2**62) as writer:
        for name, (dtype, shape) in tensors.items():
            writer.write(name, torch.randn(shape, generator=generator).mul_(0.02).to(dtype))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def make_posterior(directory: Path, seed: int) -> None:
    """Write a random posterior beside a model, unless it is there; with a strong prior, as the presets leave it."""
    if (directory / "posterior_config.json").is_file():
        return
    mean = TensorFiles(directory, "model", [])
    generator = torch.Generator().manual_seed(seed)
    variance = {n: 1e-6 * (0.5 + torch.rand(e.shape, generator=generator)) for n, e in mean.entries.items()}
    config = PosteriorConfig(
        ess=1e6, weight_decay=0.6, hess_init=1.0, num_examples=10**6, num_tokens=None, steps=1, betas=(0.9, 0.99),
        estimator="ivon-price", mean_digest=mean_digest(mean),
    )  # fmt: skip
    save_posterior(Posterior(variance, config), directory, max_shard_size="100GB")


MEASURE = """
import os, sys, time
start = time.perf_counter()
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet), 0)
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(bool(status))
"""


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and the most memory it held, MiB."""
    # A child's peak memory counts what its parent held when it was started: a small parent is put in between.
    done = subprocess.run([sys.executable, "-S", "-c", MEASURE, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise common.RecipeError(f"The command failed: {' '.join(command)}: {done.stderr[-500:]}")
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory) / 1024


def commands(arguments: argparse.Namespace, models: list[Path]) -> dict[str, tuple[list[str], int, int]]:
    """Return what is timed, and the bytes that each reads, and writes."""
    out = arguments.work_dir / "out"
    sizes = [sum(f.stat().st_size for f in m.glob("model*.safetensors")) for m in models]
    widths = [sum(f.stat().st_size for f in m.glob("posterior*.safetensors")) for m in models[1:]]
    merge = [sys.executable, "-m", "hf_ivon", "merge", "--output-dir", str(out)]
    for model in models[1:]:
        merge += ["--models", str(model)]

    inputs, posteriors = sum(sizes[1:]), sum(widths)
    found: dict[str, tuple[list[str], int, int]] = {}

    def add_cp(name: str, pattern: str, count: int) -> None:
        files = [file for model in models[1:] for file in sorted(model.glob(pattern))]
        pairs = ((str(file), str(out / f"{file.parent.name}-{file.name}")) for file in files)
        copies = " && ".join(shlex.join(["cp", *pair]) for pair in pairs)
        for ending, then in (("", ""), (SYNCED, f" && sync {shlex.quote(str(out))}/*")):
            found[name + ending] = (["sh", "-c", copies + then], count, count)

    add_cp("cp", "model*.safetensors", inputs)
    found |= {
        "average": ([*merge, "--method", "average"], inputs, sizes[0]),
        "task-arithmetic": (
            [*merge, "--method", "task-arithmetic", "--base-model", str(models[0])],
            inputs + sizes[0],
            sizes[0],
        ),
    }
    if all(widths):
        uncertainty = [*merge, "--base-model", str(models[0])]
        add_cp("cp with posteriors", "*.safetensors", inputs + posteriors)
        found["uncertainty"] = (uncertainty, inputs + sizes[0] + posteriors, sizes[0])
    if arguments.mergekit:
        config = arguments.work_dir / "linear.yml"
        parts = "".join(f"  - model: {json.dumps(str(m))}\n    parameters:\n      weight: 1.0\n" for m in models[1:])
        config.write_text(f"models:\n{parts}merge_method: linear\ndtype: bfloat16\n", encoding="utf-8")
        kit = [arguments.mergekit, str(config), str(out), "--no-copy-tokenizer", "--lazy-unpickle"]
        found["mergekit linear"] = (kit, inputs, sizes[0])
    return found


def main(argv: list[str] | None = None) -> None:
    """Make the models, run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description="Time and peak memory of merging large models.")
    parser.add_argument("--work_dir", required=True, type=Path)
    parser.add_argument("--layers", type=int, default=28, help="28 make 2.9 GiB")
    parser.add_argument("--num_models", type=int, default=4)
    parser.add_argument("--posteriors", action="store_true", help="also merge by posteriors, which are twice the size")
    parser.add_argument("--mergekit", help="the command mergekit-yaml, if it shall run too")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {arguments.rounds}")
    models = [arguments.work_dir / name for name in ("base", *(f"model-{i}" for i in range(arguments.num_models)))]
    for seed, model in enumerate(models):
        make_model(model, arguments.layers, seed)
        if arguments.posteriors and seed:
            make_posterior(model, seed)
    found: dict[str, list[tuple[float, float]]] = {}
    out = arguments.work_dir / "out"
    todo = commands(arguments, models)
    shuffled = random.Random(0)
    for _ in range(arguments.rounds):
        for name in shuffled.sample(list(todo), len(todo)):
            command, _, _ = todo[name]
            shutil.rmtree(out, ignore_errors=True)
            if name.startswith("cp"):
                out.mkdir()
            os.sync()  # what another command has left to be written to the disk is not this one's to wait for
            found.setdefault(name, []).append(run(command))
    shutil.rmtree(out, ignore_errors=True)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    rows = []
    for name, (_, read, written) in todo.items():
        peer = "cp with posteriors" if name.startswith(("cp with posteriors", "uncertainty")) else "cp"
        seconds, memory = medians[name]
        _, copied, _ = todo[peer]
        moved = (read + written) / seconds
        copying = [copied / medians[peer + ending][0] for ending in ("", SYNCED)]
        ratios = [moved / (2 * copying[0]), *(read / seconds / c for c in copying)]
        rows.append([name, seconds, moved / 2**30, *ratios, memory])
    common.write_results(str(arguments.work_dir), {"rows": rows, "rounds": found})
    print(common.table(rows, ["", "seconds", "GiB/s", "to cp", "by input", "synced", "peak MiB"]))


if __name__ == "__main__":
    common.main_guard(main)
