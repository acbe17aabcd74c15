"""Calibration and out-of-domain detection of a text classifier, as in Section 4.2 of the paper.

    python recipes/ood_study.py --train_file sst2/train.jsonl.gz --test_file sst2/test.jsonl.gz --members 5 \
        --ood ag_news=ag_news/test.jsonl.gz books=gutenberg/test.jsonl.gz --model_name_or_path roberta-base \
        --output_dir out --adamw "--learning_rate 1e-5" --ivon "--learning_rate 0.1 --ivon_ess 1e7" \
        -- --max_steps 1000

Trains members with AdamW and with IVON, one seed each, and compares on the test file: one AdamW model, the same with
dropout left on (MC dropout), the ensemble of all; one IVON model at its mean and averaged over weight samples, and the
mixture of all (Multi-IVON). Each other file is to be told from the test file by the entropy of the predictions. Of it,
rows whose text is trained on are left out. What is trained is kept; what stands after `--` goes to `run_glue.py`, for
both optimizers. `samples.png` shows the likelihood by number of samples, as Figure 4.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, set_seed

from hf_ivon import Mixture
from hf_ivon.data import load_batches, load_model, metrics_of
from hf_ivon.metrics import out_of_domain_detection
from hf_ivon.plots import metric_by_samples
from hf_ivon.posterior import Posterior
from hf_ivon.predict import Prediction, posterior_predict

try:
    from recipes import common, run_glue
    from recipes.merge_sentiment import key
except ImportError:  # run as a script: this directory is on the path
    import common
    import run_glue
    from merge_sentiment import key

Batches = list[dict[str, torch.Tensor]]
SAMPLES = (1, 4, 16, 64)
TEXTS = ("sentence", "text", "content")  # columns of texts, by preference


def train(arguments: argparse.Namespace, optimizer: str, seed: int, flags: list[str]) -> Path:
    """Train a member, unless that is done."""
    directory = arguments.output_dir / f"{optimizer}-{seed}"
    if not (directory / "results.json").is_file():
        command = ["--task_name", "sst2", "--seed", str(seed), "--eval_num_samples", "0", "--save_strategy", "no"]
        command += ["--train_file", str(arguments.output_dir / "train.jsonl")]
        command += ["--validation_file", str(arguments.output_dir / "test.jsonl")]
        command += ["--model_name_or_path", arguments.model_name_or_path, "--output_dir", str(directory)]
        command += shlex.split(getattr(arguments, optimizer)) + (["--optim", "adamw_torch"] * (optimizer == "adamw"))
        with redirect_stdout(sys.stderr):
            run_glue.main([*command, *flags])
    return directory


def read(file: str, columns: list[str]) -> list[dict[str, Any]]:
    """Return the texts of a file as `sentence`, with `label`; rows without a text, such as empty lines, are left out.

    Raises:
        RecipeError: If the file lacks a column or a text.
    """
    rows = common.load_rows(file, columns)
    found = []
    for row in rows:
        if text := next((row[c] for c in TEXTS if row.get(c)), None):
            found.append({"sentence": text, "label": row.get("label")})
    if not found:
        raise common.RecipeError(
            f"The data in {file!r} must have texts in a column {', '.join(TEXTS[:-1])} or {TEXTS[-1]}, got the "
            f"column(s) {', '.join(rows.column_names)} without. Rename the column."
        )
    return found


def prepare(arguments: argparse.Namespace, others: dict[str, str]) -> None:
    """Write the files that are used, as `sentence` and `label`; texts that are trained on are in no other file."""
    texts: set[str] = set()
    for name, file in {"train": arguments.train_file, "test": arguments.test_file, **others}.items():
        rows = read(file, [] if name in others else ["label"])
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        kept = [rows[i] for i in order if name == "train" or key(rows[i]) not in texts][:limit]
        if name == "train":
            texts = {key(row) for row in kept}
        elif name in others:
            kept = [{"sentence": row["sentence"]} for row in kept]
        (arguments.output_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def with_dropout(model: nn.Module, batches: Batches, passes: int) -> Prediction:
    """Return, on the CPU, the average of predictions with dropout left on."""
    set_seed(0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = [{k: v.to(device) for k, v in batch.items() if k != "labels"} for batch in batches]
    total: Any = 0.0
    for _ in range(passes):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        with torch.no_grad():
            logits = [model(**batch).logits.cpu() for batch in inputs]
        total = total + torch.cat(logits).double().softmax(-1) / passes
    model.eval()
    labels = [batch["labels"] for batch in batches if "labels" in batch]
    return Prediction(num_samples=passes, labels=torch.cat(labels) if labels else None, probabilities=total)


def load(directory: Path) -> nn.Module:
    """Load a member onto the accelerator, if there is one."""
    return load_model(directory).to("cuda" if torch.cuda.is_available() else "cpu")


def methods(members: dict[str, list[Path]]) -> dict[str, Callable[[Batches], Prediction]]:
    """Return what is compared: name to a function from batches to predictions."""
    adamw, ivon = load(members["adamw"][0]), load(members["ivon"][0])
    posterior = Posterior.from_pretrained(members["ivon"][0], ivon)
    number = len(members["adamw"])
    ensemble, multi = Mixture.from_pretrained(members["adamw"]), Mixture.from_pretrained(members["ivon"])
    # A mixture writes its members' weights into a model of the same kind.
    frame, multi_frame = load(members["adamw"][0]), load(members["ivon"][0])
    found: dict[str, Callable[[Batches], Prediction]] = {
        "AdamW": lambda b: posterior_predict(adamw, None, b, num_samples=0),
        "MC dropout, 16 passes": lambda b: with_dropout(adamw, b, 16),
        f"ensemble of {number}": lambda b: posterior_predict(frame, ensemble, b, num_samples=number),
        "IVON at the mean": lambda b: posterior_predict(ivon, None, b, num_samples=0),
    }
    for samples in SAMPLES:
        found[f"IVON, {samples} samples"] = lambda b, s=samples: posterior_predict(ivon, posterior, b, num_samples=s)
    found[f"Multi-IVON of {number}, 16 samples each"] = lambda b: posterior_predict(
        multi_frame, multi, b, num_samples=16 * number
    )
    return found


def measure(predict: Callable[[Batches], Prediction], test: Batches, others: dict[str, Batches]) -> dict[str, float]:
    """Return metrics on the test file, and how well each other file is told from it."""
    start = time.perf_counter()
    inside = predict(test)
    row = {"seconds": time.perf_counter() - start, **metrics_of(inside)}
    for name, batches in others.items():
        detection = out_of_domain_detection(-inside.entropy, -predict(batches).entropy)
        row |= {f"{name} {metric}": detection[metric] for metric in ("auroc", "fpr95")}
    return row


def main(argv: list[str] | None = None) -> None:
    """Run the study and print its table."""
    argv, flags = common.split_flags(argv)
    parser = argparse.ArgumentParser(description="Calibration and out-of-domain detection of a text classifier.")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--test_file", required=True)
    parser.add_argument(
        "--ood", nargs="+", default=[], metavar="NAME=FILE", help="files to be told from the test file"
    )
    parser.add_argument("--model_name_or_path", default="roberta-base")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--members", type=int, default=5, help="models of each optimizer")
    parser.add_argument("--adamw", default="", help="flags of run_glue.py for AdamW")
    parser.add_argument("--ivon", default="", help="flags of run_glue.py for IVON")
    parser.add_argument("--max_length", type=int, default=64, help="tokens at which a text is cut")
    parser.add_argument("--max_train_samples", type=int, default=None)
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="rows of each other file")
    arguments = parser.parse_args(argv)
    if wrong := [pair for pair in arguments.ood if "=" not in pair]:
        raise common.RecipeError(f"`--ood` takes NAME=FILE, got {wrong[0]!r}. Name the file, as in news={wrong[0]}.")
    others = dict(pair.split("=", 1) for pair in arguments.ood)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    prepare(arguments, others)
    flags = ["--max_length", str(arguments.max_length), *flags]
    members = {o: [train(arguments, o, s, flags) for s in range(arguments.members)] for o in ("adamw", "ivon")}
    model, tokenizer = load_model(members["adamw"][0]), AutoTokenizer.from_pretrained(members["adamw"][0])
    splits = {
        name: load_batches(arguments.output_dir / f"{name}.jsonl", model, tokenizer, max_length=arguments.max_length)
        for name in ("test", *others)
    }
    test = splits.pop("test")
    rows = {name: measure(predict, test, splits) for name, predict in methods(members).items()}
    common.write_results(str(arguments.output_dir), rows)
    by_samples = {n: rows[f"IVON, {n} samples"]["nll"] for n in SAMPLES}
    levels = {name: row["nll"] for name, row in rows.items() if name in ("AdamW", "IVON at the mean")}
    path = arguments.output_dir / "samples.png"
    metric_by_samples({"IVON, averaged": by_samples}, path, ylabel="Test NLL (nats)", references=levels)
    columns = list(next(iter(rows.values())))
    print(common.table([[name, *row.values()] for name, row in rows.items()], ["", *columns]))


if __name__ == "__main__":
    common.main_guard(main)
