"""Merge sentiment classifiers, as in Table 5 of the paper: IVON's Hessians against squared gradients and plain rules.

    python recipes/merge_sentiment.py --data_dir DATA --model_name_or_path roberta-base --output_dir out --seeds 0 1 2

DATA holds a directory for each of `imdb`, `amazon_polarity`, `yelp_polarity`, `rotten_tomatoes` and `sst2`
with files such as `imdb/train.jsonl.gz`, in their columns. A model is finetuned on each task with IVON. Two set-ups:

- `pretrained`: all five start from the pretrained model with one new head, and are merged;
- `imdb`: the model finetuned on imdb is the base, and the four that are finetuned from it are merged (Daheim et al.).

Scales are tuned on validation rows, per method. What is finished is kept, so that an interrupted run continues. What
stands after `--` goes to `run_glue.py`.
"""

import argparse
import json
import os
import re
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_ivon import save_posterior
from hf_ivon.curvature import estimate_posterior
from hf_ivon.merge.engine import merged_state_dict
from hf_ivon.merge.heads import build_model
from hf_ivon.merge.plan import make_plan
from hf_ivon.predict import evaluation_mode

try:
    from recipes import common, run_glue
except ImportError:  # run as a script: this directory is on the path
    import common
    import run_glue

TASKS = ("imdb", "amazon_polarity", "yelp_polarity", "rotten_tomatoes", "sst2")
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)


def read(data_dir: Path, task: str, split: str) -> list[dict[str, Any]]:
    """Return a split's rows as `sentence` and `label`."""
    file = data_dir / task / f"{split}.jsonl.gz"
    rows = common.load_rows(str(file), ["label"])
    texts = [" ".join(r[c] for c in ("title", "content", "text", "sentence") if r.get(c)) for r in rows]
    return [{"sentence": t, "label": int(r["label"])} for t, r in zip(texts, rows, strict=True) if r["label"] >= 0]


def key(row: dict[str, Any]) -> str:
    """Return a text's words: rotten_tomatoes and sst2 have the same sentences in two spellings."""
    return re.sub(r"\W+", "", row["sentence"].lower())


def limits_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the most rows of each split of a dataset."""
    test = arguments.max_eval_samples
    return {"train": arguments.max_train_samples, "test": test, "validation": test // 2}


def prepare(data_dir: Path, directory: Path, limits: dict[str, int]) -> None:
    """Write the splits that are used, without sentences of one task's test split in any task's training split."""
    splits = {t: {s: read(data_dir, t, s) for s in ("train", "test")} for t in TASKS}
    for task, of_task in splits.items():
        if task == "imdb":  # which has no validation split
            of_task["validation"] = of_task["train"][-limits["validation"] :]
            of_task["train"] = of_task["train"][: -limits["validation"]]
        else:
            of_task["validation"] = read(data_dir, task, "validation")
    trained = {key(r) for of_task in splits.values() for r in of_task["train"]}
    for task, of_task in splits.items():
        target = directory / task
        target.mkdir(parents=True, exist_ok=True)
        for split, rows in of_task.items():
            kept = rows if split == "train" else [r for r in rows if key(r) not in trained]
            order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: limits[split]]
            lines = (json.dumps(kept[i]) + "\n" for i in order.tolist())
            (target / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def finetune(start: Path, data: Path, directory: Path, seed: int, flags: list[str]) -> Path:
    """Finetune a model on a task, unless that is done."""
    if not (directory / "results.json").is_file():
        command = ["--task_name", "sst2", "--save_strategy", "no", "--seed", str(seed), "--eval_num_samples", "0"]
        command += ["--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "validation.jsonl")]
        command += ["--model_name_or_path", str(start), "--output_dir", str(directory)]
        with redirect_stdout(sys.stderr):
            run_glue.main([*command, *flags])
    return directory


def pretrained(root: Path, name: str, seed: int) -> Path:
    """Return the pretrained model with one new head, which all models of a seed start from."""
    directory = root / f"pretrained-{seed}" / "base"
    if not (directory / "model.safetensors").is_file():
        set_seed(seed)  # the head
        AutoModelForSequenceClassification.from_pretrained(name).save_pretrained(directory)
        AutoTokenizer.from_pretrained(name).save_pretrained(directory)
    return directory


def batches(tokenizer: Any, file: Path, length: int, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return a split as batches of rows of similar length."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    encoded = [{**tokenizer(r["sentence"], truncation=True, max_length=length), "labels": r["label"]} for r in rows]
    encoded.sort(key=lambda row: len(row["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    return [dict(collate(encoded[i : i + size])) for i in range(0, len(encoded), size)]


def accuracy(model: Any, split: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of right labels."""
    right = total = 0
    with evaluation_mode(model), torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
        for batch in split:
            inputs = {k: v.to(model.device) for k, v in batch.items()}
            labels = inputs.pop("labels")
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def with_squared_gradients(source: Path, data: list[dict[str, torch.Tensor]], train_size: int, seed: int) -> Path:
    """Return a copy of a checkpoint whose posterior is from squared gradients after training."""
    directory = source.with_name(f"{source.name}-sg")
    if not (directory / "posterior.safetensors").is_file():
        directory.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
            if (source / name).is_file() and not (directory / name).exists():
                os.link(source / name, directory / name)
        model = AutoModelForSequenceClassification.from_pretrained(directory)
        save_posterior(estimate_posterior(model, data, train_size=train_size, seed=seed), directory)
    return directory


class Study:
    """The merges of one set-up and seed, each evaluated once; results are kept in a file."""

    def __init__(self, directory: Path, splits: dict[str, dict[str, Any]]) -> None:
        self._file, self._splits = directory / "accuracies.json", splits
        self.found = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}

    def evaluate(self, name: str, split: str, models: list[Path], **settings: Any) -> dict[str, float]:
        """Merge in memory (without settings, load the only model) and return the accuracy by task."""
        label = f"{name} {split}"
        if label not in self.found:
            if settings:
                base = settings.pop("base_model", None)
                plan = make_plan([str(m) for m in models], base and str(base), **settings)
                model = build_model(plan, merged_state_dict(plan), "")
            else:
                model = AutoModelForSequenceClassification.from_pretrained(models[0])
            self.found[label] = {t: accuracy(model, s[split]) for t, s in self._splits.items()}
            self._file.write_text(json.dumps(self.found, indent=2), encoding="utf-8")
        return self.found[label]

    def tuned(self, name: str, models: list[Path], scales: tuple[float, ...], **settings: Any) -> dict[str, Any]:
        """Merge with the scale that has the best average on the validation rows."""

        def average(scale: float) -> float:
            weights = [scale] * len(models)
            return statistics.mean(
                self.evaluate(f"{name} {scale}", "validation", models, weights=weights, **settings).values()
            )

        best = max(scales, key=average)
        weights = [best] * len(models)
        return {"scale": best, **self.evaluate(f"{name} {best}", "test", models, weights=weights, **settings)}


def study(arguments: argparse.Namespace, setup: str, seed: int, data: Path, flags: list[str]) -> list[list[Any]]:
    """Return the rows of the table for one set-up and seed."""
    root = arguments.output_dir / f"{setup}-{seed}"
    root.mkdir(parents=True, exist_ok=True)
    start = pretrained(arguments.output_dir, arguments.model_name_or_path, seed)
    tasks = list(TASKS) if setup == "pretrained" else list(TASKS[1:])
    base = start
    if setup == "imdb":
        base = finetune(start, data / "imdb", start.with_name("imdb"), seed, flags)
    models = [finetune(base, data / t, root / t, seed, flags) for t in tasks]
    tokenizer = AutoTokenizer.from_pretrained(start)
    splits = {
        t: {s: batches(tokenizer, data / t / f"{s}.jsonl", arguments.max_length) for s in ("validation", "test")}
        for t in TASKS
    }
    squared = []
    for task, model in zip(tasks, models, strict=True):
        train = batches(tokenizer, data / task / "train.jsonl", arguments.max_length, 1)
        part = train[:: max(1, len(train) // arguments.curvature_samples)]
        squared.append(with_squared_gradients(model, part, len(train), seed))
    done = Study(root, splits)
    rows = {f"single: {t}": done.evaluate(t, "test", [m]) for t, m in zip(tasks, models, strict=True)}
    if setup == "imdb":
        rows = {"base: imdb": done.evaluate("imdb", "test", [base]), **rows}
    rows["average"] = done.evaluate("average", "test", models, method="average")
    shared: dict[str, Any] = {"base_model": base}
    rows["task arithmetic"] = done.tuned("task-arithmetic", models, SCALES, method="task-arithmetic", **shared)
    rows["TIES"] = done.tuned("ties", models, SCALES, method="ties", **shared)
    for name, sources in (("SG", squared), ("IVON", models)):
        ones = [1.0] * len(models)
        guided = {"method": "uncertainty", **shared}
        rows[f"{name}, weights 1"] = done.evaluate(name, "test", sources, weights=ones, **guided)
        rows[f"{name}, tuned"] = done.tuned(name, sources, SCALES, **guided)
        # By default the prior counts for no more than the average Hessian of the models. Without any, the rule is the
        # average by their Hessians; that of the squared gradients is weak.
        for label, weight_decay in (("no prior", 0.0), ("weak prior", 1e-5)):
            hessian = weight_decay * arguments.max_train_samples
            rows[f"{name}, {label}"] = done.evaluate(
                f"{name} {label}", "test", sources, weights=ones, base_hessian=hessian, **guided
            )
    return [[n, r.get("scale"), *(r[t] for t in TASKS), statistics.mean(r[t] for t in TASKS)] for n, r in rows.items()]


def main(argv: list[str] | None = None) -> None:
    """Run the study and print one table per set-up, medians over the seeds."""
    argv, flags = common.split_flags(argv)
    parser = argparse.ArgumentParser(description="Merge sentiment classifiers (Table 5).")
    parser.add_argument("--data_dir", required=True, type=Path)
    parser.add_argument("--model_name_or_path", default="roberta-base")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--setups", nargs="+", choices=["pretrained", "imdb"], default=["pretrained", "imdb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max_length", type=int, default=64, help="tokens at which a text is cut")
    parser.add_argument("--max_train_samples", type=int, default=4000, help="training rows of each task")
    parser.add_argument("--max_eval_samples", type=int, default=400, help="test rows of each task; half for tuning")
    parser.add_argument("--curvature_samples", type=int, default=400, help="examples of the squared gradients")
    arguments = parser.parse_args(argv)
    if arguments.max_eval_samples < 2:  # half of them are for tuning
        parser.error(f"argument --max_eval_samples: must be at least 2, got {arguments.max_eval_samples}")
    limits = limits_of(arguments)
    data = arguments.output_dir / "data"
    prepare(arguments.data_dir, data, limits)
    flags = ["--max_length", str(arguments.max_length), *flags]
    for setup in arguments.setups:
        tables = [study(arguments, setup, seed, data, flags) for seed in arguments.seeds]
        body = [
            [rows[0][0], *(median(column) for column in list(zip(*rows, strict=True))[1:])]
            for rows in zip(*tables, strict=True)
        ]
        print(f"Base: {setup}")
        print(common.table(body, ["", "scale", *TASKS, "average"]), flush=True)


def median(values: tuple[Any, ...]) -> Any:
    """Return the median of numbers; the first of anything else."""
    numbers = [v for v in values if isinstance(v, (int, float))]
    return statistics.median(numbers) if numbers else values[0]


if __name__ == "__main__":
    common.main_guard(main)
