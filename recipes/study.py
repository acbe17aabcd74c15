"""Run a recipe over settings and seeds, several at a time, and print the medians; finished runs are kept.

    python recipes/study.py run_glue --output_dir study --seeds 0 1 2 --workers 2 \
        --vary "--task_name mrpc" "--task_name rte" \
        --setting adamw "--optim adamw_torch --learning_rate 1e-4" \
        --setting ivon "--optim ivon --learning_rate 0.1" \
        -- --model_name_or_path roberta-base --max_steps 200

Every combination of `--vary`, `--setting` and seed is a run of its own; what stands after `--` is for all of them. A
run whose `results.json` exists is not repeated, so an interrupted study continues where it stopped.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from recipes import common
except ImportError:  # run as a script: this directory is on the path
    import common

HERE = Path(__file__).parent


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a run, flat: `train_seconds`, `mean.nll`, `averaged.nll`, ..."""
    flat = {}
    for key, value in results.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": v for name, v in value.items() if isinstance(v, (int, float))})
        elif isinstance(value, float):
            flat[key] = value
    return flat


def run(recipe: str, directory: Path, flags: list[str]) -> str | None:
    """Run the recipe in a process of its own; return what went wrong, if anything did."""
    if (directory / "results.json").is_file():
        return None
    command = [sys.executable, str(HERE / f"{recipe}.py"), "--output_dir", str(directory / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{directory.name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}"
    (directory / "run" / "results.json").rename(directory / "results.json")
    print(f"done: {directory}", file=sys.stderr, flush=True)
    return None


def main() -> None:
    """Run the study."""
    argv, shared = common.split_flags()
    parser = argparse.ArgumentParser(description="Run a recipe over settings and seeds, and print the medians.")
    parser.add_argument("recipe", choices=["run_clm", "run_glue"])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--vary", nargs="+", default=[""], help="flags that differ between the rows of the table")
    parser.add_argument("--setting", nargs=2, action="append", metavar=("NAME", "FLAGS"), required=True)
    arguments = parser.parse_args(argv)
    jobs = {}
    for row, varied in enumerate(arguments.vary):
        for name, flags in arguments.setting:
            for seed in arguments.seeds:
                directory = arguments.output_dir / f"{row}-{name}-{seed}"
                directory.mkdir(parents=True, exist_ok=True)
                jobs[directory] = [*shared, *shlex.split(varied), *shlex.split(flags), "--seed", str(seed)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        problems = [p for p in pool.map(lambda job: run(arguments.recipe, *job), jobs.items()) if p]
    rows, columns = [], []
    for row, varied in enumerate(arguments.vary):
        for name, _ in arguments.setting:
            files = [arguments.output_dir / f"{row}-{name}-{seed}" / "results.json" for seed in arguments.seeds]
            found = [numbers(json.loads(f.read_text(encoding="utf-8"))) for f in files if f.is_file()]
            columns += [key for key in dict.fromkeys(k for one in found for k in one) if key not in columns]
            rows.append((varied, name, found))
    body = [
        [f"{varied} {name}".strip(), len(found), *(median([o[c] for o in found if c in o]) for c in columns)]
        for varied, name, found in rows
    ]
    print(common.table(body, ["setting", "seeds", *columns]))
    if problems:
        raise common.RecipeError("some runs failed:\n" + "\n".join(problems))


def median(values: list[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


if __name__ == "__main__":
    common.main_guard(main)
