"""Finetune an encoder on a GLUE task with IVON or AdamW; evaluate at the mean and averaged over the posterior.

    python recipes/run_glue.py --task_name mrpc --model_name_or_path roberta-base --output_dir out
    python recipes/run_glue.py --task_name mrpc --model_name_or_path DIR --output_dir out \
        --train_file train.jsonl.gz --validation_file validation.jsonl.gz      # local rows with the columns of `glue`
    python recipes/run_glue.py recipes/settings/roberta_base_ivon.json --task_name mrpc --output_dir out

Beside the task's own metric, the table gives the negative log-likelihood (nats per example) and the expected
calibration error for classification, and the mean squared error for regression. `--metric_for_best_model task_metric`
chooses the best epoch by the task's own metric.
"""

import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)

from hf_ivon import IVONTrainer, IVONTrainingArguments, metrics, posterior_predict
from hf_ivon.predict import Prediction

try:
    from recipes import common
    from recipes.glue_tasks import TASKS, Task, task_metrics
except ImportError:  # run as a script: this directory is on the path
    import common
    from glue_tasks import TASKS, Task, task_metrics


@dataclass
class GlueArguments:
    """The task, its data and the model."""

    task_name: str = field(metadata={"help": f"One of {', '.join(TASKS)}."})
    model_name_or_path: str = field(default="roberta-base", metadata={"help": "Pretrained model: name or directory."})
    train_file: str | None = field(default=None, metadata={"help": "Training rows: json, jsonl or csv, also .gz."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation rows: json, jsonl or csv, also .gz."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many validation rows."})
    new_head: bool = field(
        default=False, metadata={"help": "Replace a classification head that the model has, if its size does not fit."}
    )
    classifier_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the last layer. Default: what the model says."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens at which a text, or pair of texts, is cut."})
    eval_num_samples: int = field(
        default=16, metadata={"help": "Weight samples of the posterior-averaged evaluation."}
    )


def load_splits(args: GlueArguments, task: Task) -> tuple[Any, Any]:
    """Return training and validation rows, checked."""
    columns = [*task.columns, "label"]
    if (args.train_file is None) != (args.validation_file is None):
        raise common.RecipeError("`train_file` and `validation_file` must be given together. Give both, or none.")
    if args.train_file is not None:
        train, validation = common.load_rows(args.train_file, columns), common.load_rows(args.validation_file, columns)
    else:
        import datasets

        try:
            splits = datasets.load_dataset("nyu-mll/glue", args.task_name)
        except OSError as err:
            raise common.RecipeError(
                f"The data of {args.task_name!r} cannot be loaded from the Hub: {err} Check the connection, or pass "
                f"--train_file and --validation_file."
            ) from err
        name = "validation_matched" if args.task_name == "mnli" else "validation"
        train, validation = splits["train"], splits[name]
    if args.max_train_samples is not None:
        train = train.select(range(min(len(train), args.max_train_samples)))
    if args.max_eval_samples is not None:
        validation = validation.select(range(min(len(validation), args.max_eval_samples)))
    for where, rows in (("training", train), ("validation", validation)):
        common.check_rows(rows, columns, f"the {where} split")
        check_texts(rows, task, f"the {where} split")
        check_labels(rows["label"], task, f"the {where} split", args.task_name)
    return train, validation


def check_texts(rows: Any, task: Task, where: str) -> None:
    """Raise a `RecipeError` if a text is missing or is none; CSV readers take words like None for a missing value."""
    for column in task.columns:
        for i, value in enumerate(rows[column]):
            if not isinstance(value, str):
                raise common.RecipeError(
                    f"`{column}` of {where} must be text, got {value!r} in row {i}. Mend the row."
                )


def check_labels(labels: Any, task: Task, where: str, name: str) -> None:
    """Raise a `RecipeError` if a label does not fit the task's head."""
    values = list(labels)
    for v in values:
        if not isinstance(v, (int, float)) or isinstance(v, bool) or not math.isfinite(v):
            raise common.RecipeError(f"Labels of {where} must be numbers, got {v!r}. Map them to `glue`'s.")
    if task.num_labels > 1 and not all(v == int(v) and 0 <= v < task.num_labels for v in values):
        wrong = next(v for v in values if v != int(v) or not 0 <= v < task.num_labels)
        raise common.RecipeError(
            f"Labels of {where} must be 0 to {task.num_labels - 1} for {name}, got {wrong!r}. Check the file; "
            f"drop rows without a label (-1)."
        )


def load_model(args: GlueArguments, task: Task) -> tuple[Any, Any]:
    """Return the model with a head for the task, and its tokenizer; a head of another size is replaced if asked."""
    name = args.model_name_or_path
    with common.from_hub("model_name_or_path", name, "a model"):
        config = AutoConfig.from_pretrained(name)
        has_head = any("ForSequenceClassification" in c for c in config.architectures or [])
        if has_head and config.num_labels != task.num_labels and not args.new_head:
            raise common.RecipeError(
                f"The head of {name!r} has {config.num_labels} outputs, and {args.task_name} needs "
                f"{task.num_labels}. Pass --new_head true to train a new one, or another model."
            )
        config.num_labels = task.num_labels
        config.problem_type = "regression" if task.num_labels == 1 else "single_label_classification"
        if args.classifier_dropout is not None:
            set_classifier_dropout(config, args.classifier_dropout)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=args.new_head
        )
        return model, AutoTokenizer.from_pretrained(name)


def set_classifier_dropout(config: Any, value: float) -> None:
    """Set the dropout before the last layer under the name that this kind of model has for it."""
    if not 0 <= value < 1:
        raise common.RecipeError(f"`classifier_dropout` must be in [0, 1), got {value}. 0 is none.")
    for key in ("classifier_dropout", "seq_classif_dropout"):
        if hasattr(config, key):
            return setattr(config, key, value)
    if not config.model_type.startswith("deberta"):
        raise common.RecipeError(f"`classifier_dropout` must be left out for {config.model_type}, got {value}.")
    config.cls_dropout = value  # read by the model, though the configuration does not declare it


def check_longest(model: Any, collator: DataCollatorWithPadding, *splits: Any) -> None:
    """Predict the longest row of each split once: what the model cannot take shows before training starts."""
    lengths = [[len(ids) for ids in rows["input_ids"]] for rows in splits]
    longest = [rows[n.index(max(n))] for rows, n in zip(splits, lengths, strict=True)]
    try:
        posterior_predict(model, None, [collator(longest)], num_samples=0)
    except (IndexError, RuntimeError, TypeError, ValueError) as err:
        raise common.RecipeError(
            f"The model cannot take texts of up to {max(map(max, lengths))} tokens in a batch: {err} Lower "
            f"--max_length to what it has positions for, or check that model and tokenizer belong together."
        ) from err


def evaluate(task_name: str, prediction: Prediction) -> dict[str, float]:
    """Return the task's metrics, and how good the probabilities are."""
    labels = prediction.labels
    if prediction.probabilities is None:
        values = prediction.prediction_mean
        error = (values - labels).double().square().mean().item()
        return {**task_metrics(task_name, values.numpy(), labels.numpy()), "mse": error}
    probabilities = prediction.probabilities
    return {
        **task_metrics(task_name, probabilities.argmax(-1).numpy(), labels.numpy()),
        "nll": metrics.negative_log_likelihood(probabilities, labels),
        "ece": metrics.expected_calibration_error(probabilities, labels),
    }


def epoch_metrics(task_name: str, output: EvalPrediction) -> dict[str, float]:
    """Return the task's metrics of an evaluation during training; `task_metric` is the one of the paper's table."""
    task = TASKS[task_name]
    predictions = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    predictions = predictions.reshape(-1) if task.num_labels == 1 else predictions.argmax(-1)
    values = task_metrics(task_name, predictions, output.label_ids)
    return {**values, "task_metric": values[task.metric]}


def check_arguments(args: GlueArguments) -> None:
    """Raise a `RecipeError` for an unknown task or a value out of range."""
    if args.task_name not in TASKS:
        raise common.RecipeError(f"`task_name` must be one of {', '.join(TASKS)}, got {args.task_name!r}.")
    for name, least in (("max_length", 1), ("eval_num_samples", 0)):
        if getattr(args, name) < least:
            raise common.RecipeError(f"`{name}` must be at least {least}, got {getattr(args, name)}. Correct it.")


def prepare(args: GlueArguments) -> tuple[Any, Any, Any, Any, DataCollatorWithPadding]:
    """Return model, tokenizer, both splits as tokens, and what puts them into batches."""
    task = TASKS[args.task_name]
    train_rows, validation_rows = load_splits(args, task)
    model, tokenizer = load_model(args, task)
    inputs = inspect.signature(model.forward).parameters

    def encode(batch: dict[str, list]) -> dict[str, list]:
        tokens = tokenizer(*(batch[c] for c in task.columns), truncation=True, max_length=args.max_length)
        encoded = {name: rows for name, rows in tokens.items() if name in inputs}
        encoded["labels"] = [float(v) if task.num_labels == 1 else int(v) for v in batch["label"]]
        return encoded

    train = train_rows.map(encode, batched=True, remove_columns=train_rows.column_names)
    validation = validation_rows.map(encode, batched=True, remove_columns=validation_rows.column_names)
    collator = DataCollatorWithPadding(tokenizer)
    check_longest(model, collator, train, validation)
    return model, tokenizer, train, validation, collator


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Finetune and evaluate; return what `results.json` holds."""
    glue, args = common.parse_args((GlueArguments, IVONTrainingArguments), argv)
    check_arguments(glue)
    common.check_output_dir(args)
    set_seed(args.seed)
    model, tokenizer, train, validation, collator = prepare(glue)
    trainer = IVONTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=partial(epoch_metrics, glue.task_name),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()  # the log, from which `hf-ivon inspect --plots` draws the run
    loader = DataLoader(validation, batch_size=args.per_device_eval_batch_size, collate_fn=collator)
    results: dict[str, Any] = {
        "task": glue.task_name,
        "optimizer": getattr(args.optim, "value", args.optim),
        "metric": TASKS[glue.task_name].metric,
        "seed": args.seed,
        "max_steps": trainer.state.max_steps,
        "train_seconds": next((r["train_runtime"] for r in trainer.state.log_history if "train_runtime" in r), None),
        "mean": evaluate(glue.task_name, posterior_predict(model, None, loader, num_samples=0)),
    }
    if trainer.ivon is not None and glue.eval_num_samples > 0:
        averaged = posterior_predict(
            model, trainer.posterior(), loader, num_samples=glue.eval_num_samples, seed=args.seed
        )
        results["averaged"] = evaluate(glue.task_name, averaged)
        results["num_samples"] = glue.eval_num_samples
    results["history"] = trainer.state.log_history
    common.write_results(args.output_dir, results)
    print_results(results)
    return results


def print_results(results: dict[str, Any]) -> None:
    """Print the metrics at the mean and averaged, side by side."""
    averaged = results.get("averaged", {})
    rows = [[name, value, averaged.get(name)] for name, value in results["mean"].items()]
    print(common.table(rows, [f"{results['task']}, {results['optimizer']}", "mean", "averaged"]))


if __name__ == "__main__":
    common.main_guard(main)
