"""Files of examples and the models they go with, for the commands: rows, tokens, batches, and how good a model is."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hf_ivon.columns import LABELS, holds_text, labels_of, text_columns_of, texts_of

if TYPE_CHECKING:
    from hf_ivon.predict import Prediction

logger = logging.getLogger(__name__)

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
_SAYS_ITS_TASK = re.compile("For[A-Z]|LMHead")
# PEFT's task types, and how the model classes for them end.
CLASS_ENDINGS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "CAUSAL_LM": "ForCausalLM",
}


def load_rows(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> Any:
    """Load a local file of rows (json, jsonl, csv or txt, also .gz) as a `datasets.Dataset`.

    Args:
        path: The file.
        columns: Columns that it must have.

    Returns:
        The rows.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If the file is missing, of another kind, empty, or lacks a column.
    """
    try:
        import datasets
    except ImportError as err:
        raise ImportError("Reading data files needs `datasets`: pip install 'hf_ivon[data]'.") from err

    file, shown = Path(path), repr(str(path))
    if not file.is_file():
        raise ValueError(f"The data file {shown} does not exist. Check the path.")
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if suffix not in _FORMATS:
        raise ValueError(f"A data file must be one of {', '.join(_FORMATS)} (also .gz), got {shown}. Convert it.")
    if not file.stat().st_size:
        raise ValueError(f"The data file {shown} is empty. Check what wrote it.")
    try:
        # The name would be taken for a pattern.
        rows = datasets.load_dataset(_FORMATS[suffix], data_files=glob.escape(str(file)), split="train")
    except Exception as err:  # datasets wraps the reader's errors in classes of its own
        cause = err.__cause__ or err
        reason = "no row was found" if isinstance(cause, StopIteration) else str(cause) or type(cause).__name__
        raise ValueError(f"The data file {shown} cannot be read as {suffix[1:]}: {reason}") from err
    return check_rows(rows, columns, shown)


def check_rows(rows: Any, columns: Sequence[str], where: str) -> Any:
    """Return the rows, if there are some and they have the columns.

    Args:
        rows: A `datasets.Dataset`, or a streamed one.
        columns: Columns that it must have.
        where: What the message calls it.

    Returns:
        The same rows.

    Raises:
        ValueError: If a column is missing, or there is no row.
    """
    names = rows.column_names
    missing = [c for c in columns if names is not None and c not in names]
    if missing:
        raise ValueError(f"The data in {where} lacks the column(s) {', '.join(missing)}; it has {', '.join(names)}.")
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError(f"The data in {where} is empty. Check the split.")
    return rows


def load_checkpoint(directory: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """Load a model, or an adapter with its base model, and the tokenizer beside it.

    Args:
        directory: A directory, or a repository's id.

    Returns:
        The model, of the class that its configuration names, in evaluation mode, and the tokenizer. Only an adapter's
        own parameters require gradients.

    Raises:
        ValueError: If there is no model or no tokenizer.
    """
    import transformers

    model, name = load_model(directory), str(directory)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as err:  # Transformers builds some without a file, and fails on the way
        raise ValueError(f"The model must have its tokenizer beside it, got {name!r}: {err}") from err
    # Without files it also builds tokenizers for which every word is unknown; a few of them have one piece, "▁".
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) <= 1:
        raise ValueError(
            f"The model must have its tokenizer beside it, got {name!r} without: Transformers makes one of the "
            f"configuration that knows no word. Save the tokenizer there: `tokenizer.save_pretrained({name!r})`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_model(directory: str | os.PathLike[str]) -> nn.Module:
    """Load a model, or an adapter with its base model.

    Args:
        directory: A directory, or a repository's id.

    Returns:
        The model, of the class that its configuration names, in evaluation mode. Only an adapter's own parameters
        require gradients.

    Raises:
        ValueError: If there is no model.
    """
    import transformers

    name = str(directory)
    try:
        if (Path(directory) / "adapter_config.json").is_file():
            import peft

            settings = peft.PeftConfig.from_pretrained(name)
            config = transformers.AutoConfig.from_pretrained(settings.base_model_name_or_path)
            ending = CLASS_ENDINGS.get(settings.task_type)
            cls = getattr(transformers, f"AutoModel{ending}") if ending else model_class(config)
            labels = labels_of_adapter(Path(directory)) if ending and ending.endswith("Classification") else None
            more = {} if labels is None else {"num_labels": labels}
            base = cls.from_pretrained(settings.base_model_name_or_path, **more)
            model = peft.PeftModel.from_pretrained(base, name, is_trainable=True)
        else:
            config = transformers.AutoConfig.from_pretrained(name)
            model = model_class(config).from_pretrained(name)
    except OSError as err:
        raise ValueError(f"The model must be a directory or a repository, got {name!r}: {err}") from err
    return model.eval()


def best_device() -> torch.device:
    """Return the accelerator of this machine, the CPU if it has none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def model_class(config: Any) -> Any:
    """Return the Transformers class that a configuration names in `architectures`; a `ValueError` if it is unknown."""
    import transformers

    name = next(iter(config.architectures or []), None)
    if name is None or not hasattr(transformers, name):
        raise ValueError(
            f"The model's configuration must name its class in `architectures`, got {config.architectures!r}."
        )
    return getattr(transformers, name)


def labels_of_adapter(directory: Path) -> int | None:
    """Return the number of labels of an adapter's saved head, None if it has none."""
    from hf_ivon.tensor_files import TensorFiles

    heads = [e for n, e in TensorFiles(directory, "adapter_model", []).entries.items() if n.endswith(
        ("score.weight", "classifier.weight", "out_proj.weight"))]  # fmt: skip
    return heads[0].shape[0] if heads else None


def is_language_model(model: nn.Module) -> bool:
    """Tell whether a model predicts the next token."""
    config: Any = getattr(model, "config", None)
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    # The class that the configuration names can be another one, which the model was made from.
    names = [n for n in (type(m).__name__ for m in (model, inner)) if _SAYS_ITS_TASK.search(n)]
    names = names[:1] or list(getattr(config, "architectures", None) or [])
    endings: tuple[str, ...] = ("ForCausalLM", "LMHeadModel")
    if not getattr(config, "is_encoder_decoder", False):  # those that also see or hear
        endings += ("ForConditionalGeneration",)
    return any(n.endswith(endings) for n in names)


def number_of_positions(model: nn.Module) -> int | None:
    """Return how many tokens a model takes at most; None if its configuration does not say, or it counts none."""
    config: Any = getattr(model, "config", None)
    if config is None or not getattr(config, "position_biased_input", True):  # DeBERTa may count distances alone
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int) or known < 1:
        return None
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == known
        if is_table and module.padding_idx is not None:
            return known - module.padding_idx - 1  # RoBERTa and its like count from the one after that of padding
    return known


def load_batches(
    data: str | os.PathLike[str] | Any,
    model: nn.Module,
    tokenizer: Any,
    *,
    text_columns: Sequence[str] = (),
    max_length: int = 128,
    batch_size: int = 32,
    max_examples: int | None = None,
    seed: int = 0,
    with_rows: bool = False,
    with_labels: bool = True,
) -> list[dict[str, Tensor]]:
    """Return examples as batches for a model, examples of similar length together.

    Args:
        data: A file of rows, see `load_rows`, or the rows that it returned.
        model: A classifier, a regression or a causal language model.
        tokenizer: Its tokenizer.
        text_columns: One column, or two for pairs; by default all columns that hold text, except the label.
        max_length: Tokens at which a text is cut; of a model or a tokenizer that takes fewer, at these.
        batch_size: Examples in a batch.
        max_examples: Take a random choice of so many; None takes all.
        seed: Of the choice.
        with_rows: Also say in each batch, as `row`, which rows of the data it has, counted from 0.
        with_labels: Read the labels; False for data of another domain, whose labels are not the model's.

    Returns:
        Batches of padded tensors, with `labels` where the file has a column `label`; of a language model, the tokens.

    Raises:
        ValueError: If the columns cannot be used, or a row lacks a text or a label.
    """
    is_file, is_lm = isinstance(data, (str, os.PathLike)), is_language_model(model)
    where = repr(str(data)) if is_file else "the given rows"
    rows = load_rows(data, text_columns) if is_file else check_rows(data, text_columns, where)
    columns = text_columns_of(rows, text_columns)
    if not 1 <= len(columns) <= 2 or not all(holds_text(rows, c) for c in columns):
        raise ValueError(
            f"One or two columns of {where} must be read as text, got {columns or 'none'} of "
            f"{', '.join(rows.column_names)}. Name them by --text-columns."
        )
    texts = [texts_of(rows, c, where) for c in columns]
    label = next((c for c in LABELS if c in rows.column_names), None) if with_labels and not is_lm else None
    labels = None if label is None else labels_of(rows, label, getattr(model, "config", None), where)
    numbers = list(range(len(rows)))
    if max_examples is not None and max_examples < len(rows):
        chosen = rows.add_column("hf_ivon_row", numbers).shuffle(seed=seed).select(range(max_examples))
        numbers = list(chosen["hf_ivon_row"])
    limits = [max_length, tokenizer.model_max_length, number_of_positions(model)]
    longest = min(limit for limit in limits if limit)
    inputs = tokenizer(*([c[number] for number in numbers] for c in texts), truncation=True, max_length=longest)
    if longest < max_length and any(len(ids) == longest for ids in inputs["input_ids"]):
        logger.warning("Texts are cut at %d tokens, which is as long as the model takes them.", longest)
    examples = [{k: v[i] for k, v in inputs.items()} for i in range(len(numbers))]
    if with_rows:
        examples = [{**e, "row": number} for e, number in zip(examples, numbers, strict=True)]
    if is_lm:
        examples = [e for e in examples if len(e["input_ids"]) > 1]
    elif labels is not None:
        examples = [{**e, "labels": labels[number]} for e, number in zip(examples, numbers, strict=True)]
    examples.sort(key=lambda e: len(e["input_ids"]))
    # On the left, padding would move a language model's positions, and its first token be predicted from padding.
    side = "right" if is_lm else tokenizer.padding_side
    batches = [
        dict(tokenizer.pad(examples[i : i + batch_size], padding_side=side, return_tensors="pt"))
        for i in range(0, len(examples), batch_size)
    ]
    for batch in batches:
        if is_lm:
            batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return batches


def evaluate(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return how good a model is at its weights: perplexity, or what `metrics_of` says.

    Args:
        model: A classifier, a regression or a causal language model.
        batches: Its batches, with labels.

    Returns:
        Metrics by name; the first one is what a table shows.

    Raises:
        ValueError: If the batches have no labels.
    """
    from hf_ivon.predict import posterior_perplexity, posterior_predict

    if is_language_model(model):
        return {"perplexity": posterior_perplexity(model, None, batches, num_samples=0)["perplexity"]}
    return metrics_of(posterior_predict(model, None, batches, num_samples=0))


def metrics_of(prediction: Prediction) -> dict[str, float]:
    """Return how good a prediction is: accuracy, likelihood and calibration, or of numbers the mean squared error.

    Args:
        prediction: Of a classifier or a regression.

    Returns:
        Metrics by name; the first one is what a table shows.

    Raises:
        ValueError: If the prediction has no labels.
    """
    from hf_ivon import metrics

    labels, probabilities = prediction.labels, prediction.probabilities
    if labels is None:
        raise ValueError("The data must have a column `label` to be evaluated on, got none. Rename the column.")
    if probabilities is None:
        assert prediction.prediction_mean is not None
        return {"mse": float((prediction.prediction_mean - labels).double().square().mean())}
    return {
        "accuracy": metrics.accuracy(probabilities, labels),
        "nll": metrics.negative_log_likelihood(probabilities, labels),
        "ece": metrics.expected_calibration_error(probabilities, labels),
        "brier": metrics.brier_score(probabilities, labels),
        "aurc": metrics.area_under_risk_coverage(probabilities, labels),
    }
