"""Train a small GPT-2 on Python's own documentation with AdamW and with IVON, offline, and show the result.

    python recipes/demo.py --output_dir demo

Both optimizers get the same model, batches, steps and schedule. Their settings are those of the study in
`recipes/PAPERS.md`, chosen on other text (books) from three learning rates for AdamW and three pairs of λ and h0 for
IVON.
The checkpoint with its posterior, both logs, a table and the curves are in the output directory afterwards.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from hf_ivon.plots import training_curves

try:
    from recipes import common, run_clm
except ImportError:  # run as a script: this directory is on the path
    import common
    import run_clm

MARKER = ".hf_ivon_demo"

SHARED = {
    "config_overrides": "n_layer=4,n_embd=256,n_head=4,n_positions=64",
    "vocab_size": 2048,
    "block_size": 64,
    "max_steps": 300,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "max_eval_blocks": 200,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": "true",
    "disable_tqdm": "true",
    "seed": 1,
}
SETTINGS = {
    "AdamW": {"optim": "adamw_torch", "learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.95},
    "IVON": {
        "optim": "ivon",
        "learning_rate": 0.5,
        "weight_decay": 1e-6,
        "ivon_ess": 1e7,
        "ivon_hess_init": 0.1,
        "eval_num_samples": 16,
    },
}


def prepare(directory: Path) -> None:
    """Empty the directory if an earlier demo made it; anything else stays, and is an error.

    Raises:
        RecipeError: If the directory holds files of another origin.
    """
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / MARKER).is_file():
            raise common.RecipeError(
                f"`output_dir` must be empty, new or of an earlier demo, got {str(directory)!r}. Choose another one."
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()


def flags(options: dict[str, object]) -> list[str]:
    """Return command-line flags."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Train a small GPT-2 with AdamW and with IVON, offline.")
    parser.add_argument("--output_dir", default="demo", help="where the results go")
    parser.add_argument("--max_steps", type=int, default=SHARED["max_steps"], help="training steps of each optimizer")
    arguments = parser.parse_args()
    directory = Path(arguments.output_dir)
    prepare(directory)
    started, results = time.time(), {}
    for name, settings in SETTINGS.items():
        print(f"\n== {name}: {' '.join(flags(settings))}", flush=True)
        options = {**SHARED, **settings, "max_steps": arguments.max_steps, "output_dir": directory / name.lower()}
        results[name] = run_clm.main(flags(options))
    curves = {
        name: [(record["step"], record["eval_loss"]) for record in result["history"] if "eval_loss" in record]
        for name, result in results.items()
    }
    figure = training_curves(curves, directory / "curves.png", title="GPT-2 from scratch on Python's documentation")
    print("\n== What the checkpoint holds\n", flush=True)
    subprocess.run([sys.executable, "-m", "hf_ivon", "inspect", str(directory / "ivon")], check=True)
    rows = [
        ["AdamW", results["AdamW"]["mean"]["perplexity"]],
        ["IVON at the mean", results["IVON"]["mean"]["perplexity"]],
        [f"IVON, {results['IVON']['num_samples']} weight samples", results["IVON"]["averaged"]["perplexity"]],
    ]
    print(f"\n== Validation perplexity after {arguments.max_steps} steps each\n")
    print(common.table(rows, ["", "perplexity"]))
    print(f"\nCheckpoint with posterior: {directory / 'ivon'}\nCurves: {figure}\nTook {time.time() - started:.0f} s.")


if __name__ == "__main__":
    common.main_guard(main)
