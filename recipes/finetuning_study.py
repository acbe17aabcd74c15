"""Finetune on eight datasets with IVON and with AdamW: what the Hessian knows, and what averaging over it gives.

    python recipes/finetuning_study.py --data_dir DATA --model_name_or_path roberta-base --output_dir out \
        --adamw "--learning_rate 1e-5" --ivon "--ivon_preset finetuning" -- --num_train_epochs 3

DATA holds the directories that `merge_sentiment.py` reads, and `mrpc`, `qnli` and `qqp` with GLUE's columns. Rows that
stand in several sentiment sets are in none of the test splits. Both optimizers start from the same weights; what is
finished is kept. IVON's models stand where `merge_sentiment.py --output_dir out` looks for them, and are merged by it;
their cards, with the metrics on the test rows, are written into `cards-SEED`.

The table has medians over the seeds: the rank correlation of the learnt Hessian with the exact diagonal, that of two
halves of the examples (see `curvature_study.py`), and accuracy, NLL and ECE on the test rows with AdamW, with IVON at
the mean, and averaged; in the last row averages over the datasets. Under it: on how many datasets, and in how many
single runs, averaging has a lower NLL and ECE than both.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from hf_ivon import IVONTrainingArguments, posterior_predict
from hf_ivon.hub import write_card
from hf_ivon.hub.card import repositories
from hf_ivon.json_files import write_json

try:
    from recipes import common, curvature_study, merge_sentiment, run_glue
except ImportError:  # run as a script: this directory is on the path
    import common
    import curvature_study
    import merge_sentiment
    import run_glue

GLUE = ("mrpc", "qnli", "qqp")
TASKS = (*merge_sentiment.TASKS, *GLUE)
METRICS = ("accuracy", "nll", "ece")


def prepare_glue(data_dir: Path, directory: Path, limits: dict[str, int]) -> None:
    """Write the rows of the GLUE tasks that are used; the validation split, which has labels, is for testing."""
    for task in GLUE:
        (directory / task).mkdir(parents=True, exist_ok=True)
        train, test = (
            common.load_rows(str(data_dir / task / f"{s}.jsonl.gz"), ["label"]) for s in ("train", "validation")
        )
        count = min(limits["train"], len(train) - limits["validation"])
        splits = {
            "train": [train[i] for i in range(count)],
            "validation": [train[i] for i in range(count, count + limits["validation"])],
            "test": [test[i] for i in range(min(limits["test"], len(test)))],
        }
        for split, rows in splits.items():
            lines = (json.dumps(row) + "\n" for row in rows)
            (directory / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def glue_name(task: str) -> str:
    """Return the GLUE task whose columns a dataset has."""
    return task if task in GLUE else "sst2"


def adamw_quality(flags: list[str]) -> dict[str, float]:
    """Return the metrics of a finished run on the test rows."""
    glue, args = common.parse_args((run_glue.GlueArguments, IVONTrainingArguments), flags)
    model, _, _, rows, collator = run_glue.prepare(glue)
    loader = DataLoader(rows, batch_size=args.per_device_eval_batch_size, collate_fn=collator)
    return run_glue.evaluate(glue.task_name, posterior_predict(model, None, loader, num_samples=0))


def study(arguments: argparse.Namespace, task: str, seed: int, flags: list[str]) -> dict[str, Any]:
    """Train and measure both optimizers on one dataset with one seed; return the numbers, kept in a file."""
    root, data = arguments.output_dir, arguments.output_dir / "data" / task
    file = root / f"study-{seed}" / f"{task}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    base = merge_sentiment.pretrained(root, arguments.model_name_or_path, seed)
    found = {}
    for optimizer, place in (("adamw", f"adamw-{seed}"), ("ivon", f"pretrained-{seed}")):
        own = [*flags, *shlex.split(getattr(arguments, optimizer)), "--task_name", glue_name(task)]
        own += ["--optim", "adamw_torch"] if optimizer == "adamw" else []
        directory = merge_sentiment.finetune(base, data, root / place / task, seed, own)
        seconds = json.loads((directory / "results.json").read_text(encoding="utf-8"))["train_seconds"]
        test = [*own, "--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "test.jsonl")]
        test += ["--model_name_or_path", str(directory), "--output_dir", str(directory), "--seed", str(seed)]
        if optimizer == "adamw":
            found[optimizer] = {"seconds": seconds, "mean": adamw_quality(test)}
        else:
            parsed = common.parse_args((run_glue.GlueArguments, IVONTrainingArguments), test)
            measured = curvature_study.measure(
                curvature_study.classifier(*parsed),
                str(directory),
                argparse.Namespace(examples=arguments.examples, samples=[arguments.samples]),
            )
            quality = measured["quality"]
            found[optimizer] = {
                "seconds": seconds,
                "mean": quality["mean"],
                "averaged": quality[f"{arguments.samples} samples"],
                "rank correlation": measured["layers"]["overall"][2],
                "of halves": measured["layers"]["overall"][4],
            }
    describe(arguments, task, seed, flags, found)
    file.parent.mkdir(exist_ok=True)
    write_json(file, found)
    print(f"done: {task}, seed {seed}", file=sys.stderr, flush=True)
    return found


def describe(arguments: argparse.Namespace, task: str, seed: int, flags: list[str], found: dict[str, Any]) -> None:
    """Write the card of IVON's model: how it was trained, and its metrics on the test rows beside AdamW's."""
    base = arguments.base_model or arguments.model_name_or_path
    name = f"{Path(base).name.lower()}-{task}-ivon"
    data, card = arguments.output_dir / "data" / task, arguments.output_dir / f"cards-{seed}" / name
    train, test = (len((data / f"{s}.jsonl").read_text(encoding="utf-8").splitlines()) for s in ("train", "test"))
    card.mkdir(parents=True, exist_ok=True)
    adamw, ivon = found["adamw"]["mean"], found["ivon"]
    metrics = ", ".join(f"{metric} {adamw[metric]:.3f}" for metric in METRICS)
    source = arguments.output_dir / f"pretrained-{seed}" / task
    header = f"base_model: {json.dumps(base)}\n" if repositories([base]) else ""
    (card / "README.md").write_text(
        f"---\n{header}library_name: transformers\n---\n\n# {name}\n\n"
        f"{base} finetuned on {train:,} rows of {task} by `recipes/finetuning_study.py`, seed {seed}, with\n\n"
        f"    {shlex.join([*shlex.split(arguments.ivon), *flags])}\n\n"
        f"The rank correlation of its variances' Hessian with the exact diagonal of {arguments.examples} training "
        f"rows is {ivon['rank correlation']:.3f}.\nAdamW, on the same rows from the same start: {metrics} on the "
        f"{test} test rows of the table below.\n",
        encoding="utf-8",
    )
    tables = {key: {metric: ivon[key][metric] for metric in METRICS} for key in ("mean", "averaged")}
    split = "validation" if task in GLUE else "test"
    measured = {"data": f"{task}, {test} rows of its {split} split", **tables, "num_samples": arguments.samples}
    common.write_results(str(card), measured)
    write_card(card, name, source=source)


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over the seeds, in the same structure."""
    first = runs[0]
    return {
        key: medians([run[key] for run in runs])
        if isinstance(value, dict)
        else statistics.median(r[key] for r in runs)
        for key, value in first.items()
    }


def is_better(found: dict[str, Any]) -> bool:
    """Tell whether averaging has a lower NLL and ECE than IVON's mean and AdamW."""
    averaged, others = found["ivon"]["averaged"], (found["ivon"]["mean"], found["adamw"]["mean"])
    return all(averaged[metric] < other[metric] for metric in ("nll", "ece") for other in others)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the study, print its table and return the medians by dataset."""
    argv, flags = common.split_flags(argv)
    parser = argparse.ArgumentParser(description="Finetune on eight datasets with IVON and AdamW.")
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--model_name_or_path", default="roberta-base")
    parser.add_argument("--base_model", help="what cards call that model, if it is a directory")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="datasets; all if not given")
    parser.add_argument("--adamw", default="", help="flags of run_glue.py for AdamW")
    parser.add_argument("--ivon", default="--ivon_preset finetuning", help="flags of run_glue.py for IVON")
    parser.add_argument("--max_length", type=int, default=64, help="tokens at which a text is cut")
    parser.add_argument("--max_train_samples", type=int, default=1000, help="training rows of each dataset")
    parser.add_argument("--max_eval_samples", type=int, default=400, help="test rows of each dataset")
    parser.add_argument("--examples", type=int, default=256, help="training examples of the exact diagonal")
    parser.add_argument("--samples", type=int, default=16, help="weight samples")
    arguments = parser.parse_args(argv)
    limits = merge_sentiment.limits_of(arguments)
    merge_sentiment.prepare(arguments.data_dir, arguments.output_dir / "data", limits)
    prepare_glue(arguments.data_dir, arguments.output_dir / "data", limits)
    flags = ["--max_length", str(arguments.max_length), *flags]
    runs = {seed: {t: study(arguments, t, seed, flags) for t in arguments.tasks} for seed in arguments.seeds}
    found = {task: medians([runs[seed][task] for seed in arguments.seeds]) for task in arguments.tasks}
    header = ["", "rank corr.", "halves"]
    header += [f"{who} {m}" for who in ("AdamW", "mean", "averaged") for m in METRICS] + ["time"]
    body = []
    for task, of_task in found.items():
        ivon, adamw = of_task["ivon"], of_task["adamw"]
        qualities = [quality[m] for quality in (adamw["mean"], ivon["mean"], ivon["averaged"]) for m in METRICS]
        ratio = ivon["seconds"] / adamw["seconds"]
        body.append([task, ivon["rank correlation"], ivon["of halves"], *qualities, ratio])
    body.append(["average", *(statistics.mean(column) for column in list(zip(*body, strict=True))[1:])])
    print(common.table(body, header))
    single = [is_better(run) for of_seed in runs.values() for run in of_seed.values()]
    print(
        f"Averaging is better than both on {sum(map(is_better, found.values()))} of {len(found)} datasets, in "
        f"{sum(single)} of {len(single)} runs."
    )
    write_json(arguments.output_dir / "study.json", found)
    return found


if __name__ == "__main__":
    common.main_guard(main)
