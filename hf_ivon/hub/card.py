"""The model card: what a posterior is, how to use it and how good it is, written into the README beside it.

Of a README that is there, by a Trainer, PEFT or a person, everything is kept; only the part between two comments is
written anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ivon.checkpoint import PosteriorFormatError, open_posterior
from hf_ivon.data import CLASS_ENDINGS, labels_of_adapter
from hf_ivon.json_files import read_json
from hf_ivon.posterior_config import PosteriorConfig, setting_text

CARD_NAME = "README.md"
RESULTS_NAME = "results.json"
FIGURES = {  # as `hf-ivon evaluate --plots` and `hf-ivon inspect --plots` name them
    "Reliability diagram": "reliability.png",
    "Entropies": "entropy.png",
    "Likelihood by number of weight samples": "samples.png",
    "Width of the posterior by layer": "sigma.png",
    "Training": "training.png",
}
_TEMPLATE = Path(__file__).with_name("card_template.md")
_OPEN, _CLOSE = "<!-- hf_ivon:", "<!-- /hf_ivon -->"
_AT_MEAN, _AVERAGED = "(at the mean)", "(averaged over the posterior)"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
_OTHER_TEXT = ("ForMaskedLM", "ForQuestionAnswering")  # take tokens alone too; a draw of the weights can be shown


def write_card(
    directory: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    license: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write or complete the README of a directory that holds a posterior.

    Metrics are from `results.json` in the directory, as `hf-ivon evaluate --output` writes it, and figures are those
    that its `--plots` and that of `hf-ivon inspect` draw.

    Args:
        directory: Where the README, results and figures are.
        repo_id: The repository that the directory goes to; without it, the card's snippet names the directory.
        source: Where the model and its posterior are, if not in the directory.
        license: Of the model, such as "apache-2.0"; None keeps the one that the README has.
        training: Settings of training that `posterior_config.json` does not hold; None keeps those of the README.

    Returns:
        The README.

    Raises:
        PosteriorFormatError: If the posterior cannot be read.
        ValueError: If the README's metadata or the results cannot be read.
    """
    directory = Path(directory)
    problems: list[str] = []
    config, variance = open_posterior(Path(source or directory), problems)
    if problems or config is None:
        raise PosteriorFormatError(f"There is no card for {str(directory)!r}: {'; '.join(problems)}. Save it again.")
    path = directory / CARD_NAME
    title = directory.resolve().name if repo_id is None else repo_id.rpartition("/")[2]
    before, after, data = _existing(path, title)
    model = _describe_model(Path(source or directory))
    results = _results(directory / RESULTS_NAME)
    _complete(data, config, model, license, training)
    if found := _eval_results(data, model, results):
        data.eval_results, data.model_name = found, data.model_name or title
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        before=before,
        after=after,
        name=repo_id or os.fspath(directory),
        is_ivon=config.estimator.startswith("ivon-"),
        num_parameters=sum(entry.numel for entry in variance.entries.values()),
        size=_size(4 * sum(entry.numel for entry in variance.entries.values())),
        settings=_settings(config) | _training_of(data, config),
        figures={title: file for title, file in FIGURES.items() if (directory / file).is_file()},
        **model,
        **results,
    )
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{CARD_NAME}.tmp")
    temporary.write_text(str(card), encoding="utf-8")
    os.replace(temporary, path)
    return path


def repositories(names: Iterable[str]) -> list[str]:
    """Return which names of models are repositories on the Hub, not paths here, without the revision behind "@"."""
    plain = [name.partition("@")[0] for name in names if not Path(name).exists()]
    return [name for name in plain if _REPOSITORY.fullmatch(name)]


def _existing(path: Path, title: str) -> tuple[str, str, ModelCardData]:
    """Return what stands in a README before and after our part, and its metadata."""
    if not path.is_file():
        return f"\n# {title}\n\n", "\n", ModelCardData()
    content = path.read_text(encoding="utf-8")
    try:
        # A header without fields would be warned about.
        card: Any = ModelCard(content if content.startswith("---") else f"---\n{{}}\n---\n{content}")
    except (ValueError, yaml.YAMLError) as err:
        raise ValueError(f"The metadata of {str(path)!r} cannot be read: {err}. Mend it, or move the file.") from err
    before, opened, rest = card.text.partition(_OPEN)
    if not opened:
        return "\n" + before.strip("\n") + "\n\n", "\n", card.data
    return before, rest.partition(_CLOSE)[2], card.data


def _complete(
    data: ModelCardData,
    config: PosteriorConfig,
    model: Mapping[str, Any],
    license: str | None,
    training: Mapping[str, Any] | None,
) -> None:
    """Add to a card's metadata what the files say, and take out paths of a machine, which the Hub does not accept."""
    tags = [*(["ivon"] if config.estimator.startswith("ivon-") else []), "posterior"]
    kept = [
        tag for tag in data.tags or [] if not (tag.startswith("base_model:") and "/" in tag.rpartition(":")[2][:1])
    ]
    data.tags = kept + [tag for tag in tags if tag not in kept]
    named = data.base_model if isinstance(data.base_model, list) else [data.base_model or config.base_model]
    bases = repositories(base for base in named if base)
    data.base_model = bases if len(bases) > 1 else next(iter(bases), None)
    data.library_name = data.library_name or (model["library"] if model["model_class"] else None)
    data.pipeline_tag = data.pipeline_tag or model["task"]
    data.license = license or data.license
    if training is not None:
        data["ivon"] = dict(training)


def _describe_model(directory: Path) -> dict[str, Any]:
    """Return what the card's snippet depends on: library, class and kind of a model or an adapter.

    Of a kind that may need more than tokens, such as pictures or a second text, the snippet only shows the posterior.
    """
    found: dict[str, Any] = {"library": "transformers", "model_class": None, "num_labels": None}
    found |= {"task": None, "kind": "other"}
    found["has_tokenizer"] = (directory / "tokenizer_config.json").is_file()
    adapter, config = (read_json(directory / f"{name}config.json", []) or {} for name in ("adapter_", ""))
    if adapter:
        ending = CLASS_ENDINGS.get(adapter.get("task_type") or "")
        found |= {"library": "peft", "model_class": f"AutoPeftModel{ending}" if ending else None}
        found["num_labels"] = labels_of_adapter(directory) if (ending or "").endswith("Classification") else None
    else:
        name = next(iter(config.get("architectures") or []), None)
        found["model_class"] = None if "auto_map" in config else name
        labels = config.get("id2label")
        found["num_labels"] = len(labels) if labels else 2  # a configuration leaves out what is by default two labels
    name = found["model_class"] or ""
    if not name.endswith((*_TASKS, *_OTHER_TEXT)) or not (adapter or _takes_tokens(name)):
        return found
    found["task"] = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    # What is averaged must be one class, or one number: of several labels or numbers there is a draw to be seen.
    several = config.get("problem_type") == "multi_label_classification" or (
        config.get("problem_type") == "regression" and found["num_labels"] != 1
    )
    if found["task"] == "text-generation":
        found["kind"] = "language model"
    elif found["task"] and not several:
        is_number = found["task"] == "text-classification" and found["num_labels"] == 1
        found["kind"] = "regression" if is_number else "classifier"
    else:
        found["kind"] = "model"
    return found


def _takes_tokens(name: str) -> bool:
    """Tell whether the first thing that a class of Transformers takes is the numbers of tokens."""
    import transformers

    return getattr(getattr(transformers, name, None), "main_input_name", None) == "input_ids"


def _training_of(data: ModelCardData, config: PosteriorConfig) -> dict[str, Any]:
    """Return the settings of training that the metadata keep; none if the posterior is not from this training."""
    kept = data.get("ivon")
    return (
        {f"`{k}`": v for k, v in kept.items()}
        if isinstance(kept, dict) and config.estimator.startswith("ivon-")
        else {}
    )


def _settings(config: PosteriorConfig) -> dict[str, str]:
    """Return the rows of the table of settings."""
    rows: dict[str, Any] = {
        "estimator": config.estimator,
        "effective sample size (`ess`)": setting_text(config.ess),
        "training examples (`num_examples`)": config.num_examples,
        "label tokens (`num_tokens`)": config.num_tokens,
        "prior precision per example (`weight_decay`)": setting_text(config.weight_decay),
        "start value of the Hessian (`hess_init`)": setting_text(config.hess_init),
        "`beta1`, `beta2`": ", ".join(f"{beta:g}" for beta in config.betas),
        "optimizer steps (`steps`)": config.steps,
        "versions": ", ".join(f"{name} {version}" for name, version in config.versions.items()) or None,
    }
    return {
        name: f"{value:,}" if isinstance(value, int) else value for name, value in rows.items() if value is not None
    }


def _results(path: Path) -> dict[str, Any]:
    """Return the metrics in a file that `hf-ivon evaluate` or a recipe wrote; empty ones if there is no file."""
    if not path.is_file():
        return {"results": {}, "averaged": {}, "num_samples": None, "dataset": None}
    problems: list[str] = []
    found = read_json(path, problems) or {}
    tables = {key: found.get(key) or {} for key in ("mean", "averaged")}
    if not all(isinstance(table, dict) for table in tables.values()):
        problems.append(f"`mean` and `averaged` in {path.name} must be objects of metrics")
    if problems:
        raise ValueError(f"The results {str(path)!r} cannot be used: {problems[0]}. Evaluate again, or move the file.")
    mean, averaged = ({k: v for k, v in t.items() if isinstance(v, (int, float))} for t in tables.values())
    return {
        "results": mean,
        "averaged": averaged if averaged.keys() >= mean.keys() else {},
        "num_samples": found.get("num_samples"),
        "dataset": found.get("data") or found.get("task"),
    }


def _eval_results(data: ModelCardData, model: Mapping[str, Any], results: Mapping[str, Any]) -> list[EvalResult]:
    """Return the results for the `model-index`: those of others as they are, and ours anew."""
    ours = (_AT_MEAN, _AVERAGED)
    kept = [r for r in data.eval_results or [] if not (r.metric_name or "").endswith(ours)]
    dataset = results["dataset"] or "evaluation data"
    described: dict[str, Any] = {"task_type": model["task"] or data.pipeline_tag or "other", "dataset_name": dataset}
    described["dataset_type"] = Path(dataset).stem
    for table, suffix in ((results["results"], _AT_MEAN), (results["averaged"], _AVERAGED)):
        kept += [
            EvalResult(**described, metric_type=name, metric_name=f"{name} {suffix}", metric_value=value)
            for name, value in table.items()
        ]
    return kept


def _size(num_bytes: float) -> str:
    """Return a number of bytes to read."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
