"""Predicting generalization, and finding wrong labels, without validation data: Section 4.4 of the paper.

    python recipes/sensitivity_study.py --train_file sst2/train.jsonl.gz --test_file sst2/validation.jsonl.gz \
        --model_name_or_path roberta-base --output_dir out --max_train_samples 2000 --wrong_labels 0.1 \
        -- --num_train_epochs 5 --ivon_preset finetuning

Some labels of the training rows are made wrong, and a classifier is trained on them with IVON. After each epoch the
table has the average loss on training rows; what it would be on each had it been left out (the leave-one-out estimate,
with every `--ess_scale`); the loss on test rows with as many wrong labels, which that is to predict; and how well the
wrong labels are told by the sensitivity and by the loss (the area under the ROC curve). The losses are also drawn, in
`loo.png`. What stands after `--` goes to `run_glue.py`.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_ivon import Posterior, estimate_sensitivity, posterior_predict
from hf_ivon.data import load_batches, load_model
from hf_ivon.metrics import accuracy, negative_log_likelihood, out_of_domain_detection
from hf_ivon.plots import training_curves

try:
    from recipes import common, ood_study, run_glue
except ImportError:  # run as a script: this directory is on the path
    import common
    import ood_study
    import run_glue


def prepare(arguments: argparse.Namespace) -> Tensor:
    """Write the rows as `sentence` and `label`, some of the training labels wrong; return which are, (rows,), bool."""
    ood_study.prepare(arguments, {})
    file = arguments.output_dir / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    classes = 1 + max(row["label"] for row in rows)
    generator = torch.Generator().manual_seed(1)
    wrong = torch.zeros(len(rows), dtype=torch.bool)
    wrong[torch.randperm(len(rows), generator=generator)[: round(arguments.wrong_labels * len(rows))]] = True
    moves = torch.randint(1, classes, (len(rows),), generator=generator)
    for row, is_wrong, move in zip(rows, wrong.tolist(), moves.tolist(), strict=True):
        if is_wrong:
            row["label"] = (row["label"] + move) % classes
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return wrong


def train(arguments: argparse.Namespace, flags: list[str]) -> list[Path]:
    """Train, unless that is done; return the checkpoints, one after each epoch."""
    directory = arguments.output_dir / "ivon"
    if not (directory / "results.json").is_file():
        command = ["--task_name", "sst2", "--save_strategy", "epoch", "--save_only_model", "true"]
        command += ["--train_file", str(arguments.output_dir / "train.jsonl")]
        command += ["--validation_file", str(arguments.output_dir / "test.jsonl")]
        command += ["--model_name_or_path", arguments.model_name_or_path, "--output_dir", str(directory)]
        with redirect_stdout(sys.stderr):
            run_glue.main([*command, "--max_length", str(arguments.max_length), *flags])
    return sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def measure(checkpoint: Path, arguments: argparse.Namespace, wrong: Tensor) -> dict[str, Any]:
    """Return the numbers of one checkpoint."""
    model, tokenizer = load_model(checkpoint), AutoTokenizer.from_pretrained(checkpoint.parent)
    files = {name: arguments.output_dir / f"{name}.jsonl" for name in ("train", "test")}
    options = {"max_length": arguments.max_length}
    batches = load_batches(
        files["train"], model, tokenizer, **options, max_examples=arguments.max_examples, with_rows=True
    )
    is_wrong = wrong[torch.cat([batch.pop("row") for batch in batches])]
    posterior = Posterior.from_pretrained(checkpoint, model)
    found = estimate_sensitivity(model, posterior, batches)
    test = posterior_predict(model, None, load_batches(files["test"], model, tokenizer, **options), num_samples=0)
    assert found.outputs is not None
    assert found.change is not None
    assert found.labels is not None
    labels = found.labels.long()
    row: dict[str, Any] = {"train": float(found.loss.mean())}
    for scale in arguments.ess_scale:
        left_out = (found.outputs + found.change / scale).softmax(dim=1)
        row[f"left out, {scale:g}"] = negative_log_likelihood(left_out, labels)
    assert test.probabilities is not None
    assert test.labels is not None
    row |= {
        "test": expected_loss(test.probabilities, test.labels, arguments.wrong_labels),
        "test accuracy": accuracy(test.probabilities, test.labels),
    }
    if is_wrong.any() and not is_wrong.all():
        for name, values in (("by sensitivity", found.score), ("by loss", found.loss)):
            row[name] = out_of_domain_detection(values[is_wrong], values[~is_wrong])["auroc"]
    return row


def expected_loss(probabilities: Tensor, labels: Tensor, wrong_labels: float) -> float:
    """Return the loss on rows whose labels are each wrong with a probability, averaged over which are."""
    logs = probabilities.clamp_min(1e-12).log()
    of_label = logs.gather(1, labels[:, None])[:, 0]
    others = (logs.sum(dim=1) - of_label) / (logs.shape[1] - 1)
    return float(-((1 - wrong_labels) * of_label + wrong_labels * others).mean())


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the study, print its table and return the rows."""
    argv, flags = common.split_flags(argv)
    parser = argparse.ArgumentParser(description="Leave-one-out estimates and wrong labels of a text classifier.")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--model_name_or_path", default="roberta-base")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--wrong_labels", type=float, default=0.1, help="share of the training labels made wrong")
    parser.add_argument("--ess_scale", nargs="+", type=float, default=[1.0, 20.0], help="factors on the precision")
    parser.add_argument("--max_examples", type=int, default=300, help="training rows that are looked at")
    parser.add_argument("--max_length", type=int, default=64, help="tokens at which a text is cut")
    parser.add_argument("--max_train_samples", type=int, default=None)
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="test rows")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.wrong_labels < 1:
        raise common.RecipeError(f"`--wrong_labels` must be in [0, 1), got {arguments.wrong_labels}. 0.1 is usual.")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    wrong = prepare(arguments)
    rows = []
    for epoch, checkpoint in enumerate(train(arguments, flags), start=1):
        rows.append({"epoch": epoch, **measure(checkpoint, arguments, wrong)})
        print(f"done: {checkpoint.name}", file=sys.stderr, flush=True)
    common.write_results(str(arguments.output_dir), {"rows": rows})
    losses = [name for name in rows[0] if name.startswith("left out")]
    curves = {name: [(row["epoch"], row[name]) for row in rows] for name in ("train", *losses, "test")}
    training_curves(curves, arguments.output_dir / "loo.png", xlabel="Epoch", ylabel="Loss (nats)", log_y=True)
    print(common.table([list(row.values()) for row in rows], list(rows[0])))
    return rows


if __name__ == "__main__":
    common.main_guard(main)
