"""Pretrain with AdamW and with IVON, as many steps as AdamW makes in some minutes: loss against steps and time.

    python recipes/pretraining_race.py --output_dir race --minutes 10                 # embedded corpus, offline
    python recipes/pretraining_race.py --output_dir race --minutes 10 \\
        --setting AdamW "--optim adamw_torch_fused --learning_rate 6e-4 --weight_decay 0.1 --adam_beta2 0.95" \\
        --setting IVON "--optim ivon --ivon_preset pretraining" \\
        -- --train_file books.jsonl.gz --config_overrides n_positions=1024 --block_size 1024 --vocab_size 50257 \\
        --per_device_train_batch_size 12 --gradient_accumulation_steps 8 --bf16 true      # GPT-2 on a GPU

What stands after `--` is for all runs, and is handed to `run_clm.py`; without it they are those of the demo. The first
setting is timed for a few steps, and all get the number of steps that it makes in the time given, so that each
schedule ends. Time is that of training alone. `results.json`, `loss_by_step.png`, `loss_by_time.png` and each run's
checkpoint are in the output directory afterwards.
"""

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

from hf_ivon.plots import training_curves

try:
    from recipes import common, demo, run_clm
except ImportError:  # run as a script: this directory is on the path
    import common
    import demo
    import run_clm

# Of the steps that are timed, the first ones read files, compile, and fill the allocator.
_WARM_UP, _TIMED = 10, 20
_POINTS = 20  # of each curve


def step_seconds(flags: list[str]) -> float:
    """Return how long a training step takes."""
    timing = {
        "max_steps": _WARM_UP + _TIMED,
        "logging_steps": _WARM_UP,
        "eval_strategy": "no",
        "max_eval_blocks": 1,
        "eval_num_samples": 0,
    }
    with tempfile.TemporaryDirectory() as directory:
        history = run_clm.main([*flags, *demo.flags({**timing, "output_dir": directory})])["history"]
    seconds = {record["step"]: record["train_seconds"] for record in history if "loss" in record}
    return (seconds[_WARM_UP + _TIMED] - seconds[_WARM_UP]) / _TIMED


def curve(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the points of the validation loss: what the records have under a key, and the loss."""
    return [(record[key], record["eval_loss"]) for record in history if "eval_loss" in record]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the race; return what `results.json` holds."""
    argv, given = common.split_flags(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="where the results go; empty or new")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the first setting trains")
    parser.add_argument("--setting", nargs=2, action="append", metavar=("NAME", "FLAGS"), help="the demo's by default")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        raise common.RecipeError(f"`minutes` must be positive, got {arguments.minutes}. Correct it.")
    directory = arguments.output_dir
    if directory.is_dir() and any(directory.iterdir()):
        raise common.RecipeError(f"`output_dir` must be empty or new, got {str(directory)!r}. Choose another one.")
    settings = {name: demo.flags(options) for name, options in demo.SETTINGS.items()}
    if arguments.setting:
        settings = {name: shlex.split(flags) for name, flags in arguments.setting}
    shared = [*demo.flags({key: value for key, value in demo.SHARED.items() if key != "use_cpu"}), *given]
    first, *_ = settings
    steps = round(60 * arguments.minutes / step_seconds([*shared, *settings[first]]))
    steps = max(steps, _POINTS)
    print(f"\n== {steps} steps, {arguments.minutes:g} minutes of {first}", flush=True)
    schedule = {"max_steps": steps, "warmup_steps": steps // 10}
    schedule |= dict.fromkeys(("eval_steps", "logging_steps"), steps // _POINTS)
    runs = {}
    for name, flags in settings.items():
        own = demo.flags({**schedule, "output_dir": directory / name.lower().replace(" ", "-")})
        runs[name] = run_clm.main([*shared, *flags, *own])
    for key, label, scale in (("step", "Optimizer step", 1), ("train_seconds", "Minutes of training", 60)):
        curves = {
            name: [(x / scale, loss) for x, loss in curve(result["history"], key)] for name, result in runs.items()
        }
        figure = directory / f"loss_by_{key.removeprefix('train_').replace('seconds', 'time')}.png"
        training_curves(curves, figure, xlabel=label)
    seconds = {name: result["history"][-1]["train_seconds"] for name, result in runs.items()}
    rows = [
        [name, seconds[name], seconds[name] / seconds[first], result["mean"]["perplexity"]]
        for name, result in runs.items()
    ]
    print(f"\n== After {steps} steps each\n")
    print(common.table(rows, ["", "seconds", f"to {first}", "perplexity"]))
    results = {"steps": steps, "seconds": seconds, "runs": runs}
    common.write_results(str(directory), results)
    return results


if __name__ == "__main__":
    common.main_guard(main)
