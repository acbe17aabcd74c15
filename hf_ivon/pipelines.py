"""Transformers' classification pipelines, with scores averaged over the posterior, uncertainties, and abstention.

Inputs and results pass through the pipelines' own code; between them stand several forward passes instead of one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.pipelines.token_classification import AggregationStrategy
from transformers.utils import ModelOutput

from hf_ivon.averaging import MEASURES, ScoreAverage
from hf_ivon.draws import check_samples, weight_samples
from hf_ivon.mixture import Mixture
from hf_ivon.posterior import Posterior
from hf_ivon.predict import evaluation_mode

_DTYPES = ("dtype", "torch_dtype")  # the name that Transformers gives it, and the one it gave before
_WINDOW = 256  # batches of an endless stream that share one round of weight samples


def pipeline(
    task: str,
    model: Any,
    *,
    posterior: Posterior | Mixture | None = None,
    num_samples: int = 16,
    seed: int = 0,
    ess_scale: float = 1.0,
    abstain_above: float | None = None,
    abstain_by: str = "entropy",
    **kwargs: Any,
) -> Any:
    """Build a pipeline that averages over the posterior, in place of `transformers.pipeline`.

    It takes what that pipeline takes and returns what it returns, with more in every result:

    - `score`: the score of the pipeline, averaged over the weight samples.
    - `entropy`: of the averaged probabilities, nats; `mutual_information`: the part of it that is due to the weights,
      nats. With one yes or no for each label (`problem_type` "multi_label_classification", or the sigmoid) they are of
      each label; of a group of tokens they are those of its least certain token. A regression, or the function "none",
      has `variance` instead: over the weight samples, in the squared unit of the score.
    - `abstained`, if `abstain_above` is given: whether the uncertainty is above it. Then the label (`label`, `entity`
      or `entity_group`) is None, and stands under `withheld`.

    Each weight sample is drawn once a call, and once in 256 batches of a generator or a data set. Afterwards the
    weights are the mean, bit for bit, whatever was raised. Meanwhile they are not: calls from several threads take
    turns, but whoever else uses the model at the same time meets a weight sample. For requests side by side, load the
    model once per worker.

    Args:
        task: "text-classification", "image-classification" or "token-classification", or an alias of one.
        model: A directory or a repository's id; a local directory may be an adapter's. Or a model, then with its
            `tokenizer` or `image_processor`, as for `transformers.pipeline`.
        posterior: The posterior that belongs to the model, or a mixture; None reads it from where the model is.
        num_samples: Number of weight samples; 0 predicts at the mean, without a posterior.
        seed: Chooses the weight samples.
        ess_scale: Factor on the precision of the posterior, > 0; below 1 it is wider than it was saved.
        abstain_above: Uncertainty above which no label is given, in the unit of `abstain_by`; None never abstains.
        abstain_by: Which uncertainty that is: "entropy", "mutual_information", or "variance" for a regression.
        kwargs: Passed to `transformers.pipeline`, such as `device`, `batch_size`, `revision` or `top_k`. With an
            adapter's directory, `dtype` and `model_kwargs` are refused.

    Returns:
        The pipeline; the settings above are attributes of it, and can be changed.

    Raises:
        ValueError: If the task is another one, a number is not in its range, an argument has no effect, or the
            posterior does not belong to the model.
        PosteriorFormatError: If there is no posterior where the model is, or anything is wrong with it.

    Source:
        arXiv:2402.17641, Section 4.2: posterior averaging in the space of probabilities.
    """
    if task not in _CLASSES:
        raise ValueError(
            f"`task` must be one of {', '.join(sorted(_CLASSES))}, got {task!r}. For other models there is "
            f"`posterior.sampled`."
        )
    place = str(model) if isinstance(model, (str, PathLike)) else None
    if place is None and posterior is None and num_samples:
        raise ValueError(
            "`posterior` must be given with a model that is loaded, got None. Pass `load_posterior(directory, model)`."
        )
    if place is not None and (Path(place) / "adapter_config.json").is_file():
        from hf_ivon.data import load_checkpoint

        if ignored := [name for name in (*_DTYPES, "model_kwargs") if kwargs.get(name) not in (None, "auto", {})]:
            raise ValueError(
                f"`{ignored[0]}` must be left out for an adapter's directory, got {kwargs[ignored[0]]!r}. Load the "
                f"adapter on its base model as you want it, and pass that with its `posterior` and `tokenizer`."
            )
        model, tokenizer = load_checkpoint(place)  # as a PEFT model, whose tensors have the names of its posterior
        kwargs.setdefault("tokenizer", tokenizer)
    pipe = transformers.pipeline(task, model=model, pipeline_class=_CLASSES[task], **kwargs)
    if posterior is None and num_samples:
        posterior = _read_posterior(str(place), pipe.model, kwargs)
    pipe.posterior, pipe.num_samples, pipe.seed, pipe.ess_scale = posterior, num_samples, seed, ess_scale
    pipe.abstain_above, pipe.abstain_by = abstain_above, abstain_by
    pipe.check()
    return pipe


def _read_posterior(place: str, model: Any, kwargs: dict[str, Any]) -> Posterior:
    own = kwargs.get("model_kwargs") or {}
    where = {k: own[k] for k in ("cache_dir", "local_files_only", "subfolder") if k in own}
    where |= {k: kwargs[k] for k in ("revision", "token") if k in kwargs}
    # Loaded in another dtype, or quantized, the mean is no longer the one that the posterior was saved with.
    as_saved = all(kwargs.get(name, "auto") == "auto" for name in _DTYPES) and not set(own) - set(where)
    return Posterior.from_pretrained(place, model if as_saved else None, check_values=True, **where)


class _AveragedBatches:
    """Stands in a pipeline for the loader of its batches, and gives outputs instead."""

    def __init__(self, pipe: Any, loader: Any, window: int | None, *params: dict[str, Any]) -> None:
        self.pipe, self.loader, self.window, self.params = pipe, loader, window, params

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)
        while window := list(islice(batches, self.window)):
            yield from self.pipe.average(window, *self.params)


class _PosteriorPipeline:
    """What makes a classification pipeline average: put before its class in the bases."""

    posterior: Posterior | Mixture | None = None
    num_samples = 0
    seed = 0
    ess_scale = 1.0
    abstain_above: float | None = None
    abstain_by = "entropy"

    def check(self) -> None:
        """Check the settings, which may have been changed."""
        check_samples(self.posterior, self.num_samples, self.seed)
        known = sorted({name for names in MEASURES.values() for name in names})
        if self.abstain_by not in known:
            raise ValueError(f"`abstain_by` must be one of {', '.join(known)}, got {self.abstain_by!r}. Choose one.")
        if self.abstain_above is None:
            return
        if not 0 <= self.abstain_above < math.inf:
            raise ValueError(
                f"`abstain_above` must be a number of at least 0, got {self.abstain_above!r}. The entropy of C "
                f"classes is at most log C nats."
            )
        if not self.num_samples and self.abstain_by != "entropy":
            raise ValueError(
                f"`num_samples` must be at least 2 to abstain by {self.abstain_by!r}, got 0, where it is always 0. "
                f"Take weight samples, or abstain by 'entropy'."
            )

    def get_iterator(self, inputs: Any, *settings: Any) -> Any:
        """Return the base class's iterator over results, with averages in place of its forward passes."""
        *_, forward_params, postprocess_params = settings
        results = super().get_iterator(inputs, *settings)
        outputs = results.loader
        window = None if isinstance(inputs, list) else _WINDOW
        outputs.loader = _AveragedBatches(self, outputs.loader, window, forward_params, postprocess_params)
        outputs.infer, outputs.params = _same, {}
        return results

    def run_single(self, inputs: Any, preprocess_params: Any, forward_params: Any, postprocess_params: Any) -> Any:
        """Return the result for one input."""
        batch = self.preprocess(inputs, **preprocess_params)
        [outputs] = self.average([batch], forward_params, postprocess_params)
        return self.postprocess(outputs, **postprocess_params)

    def average(
        self, batches: Sequence[Any], forward_params: dict[str, Any], postprocess_params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return outputs for each batch, averaged over weight samples."""
        self.check()
        function = self.function(postprocess_params)
        if self.abstain_above is not None and self.abstain_by not in MEASURES[function]:
            raise ValueError(
                f"`abstain_by` must be one of {', '.join(MEASURES[function])} for scores by the function "
                f"{function!r}, got {self.abstain_by!r}. Choose one of them."
            )
        averages = [ScoreAverage(function) for _ in batches]
        others: list[dict[str, Any]] = [{} for _ in batches]  # what a tagger hands on beside the logits
        samples = weight_samples(
            self.model, self.posterior, num_samples=self.num_samples, seed=self.seed, ess_scale=self.ess_scale
        )
        with evaluation_mode(self.model):
            for weights in samples:
                with weights:
                    for i, batch in enumerate(batches):
                        outputs = self.forward(batch, **forward_params)
                        averages[i].add(outputs["logits"])
                        others[i] = {} if isinstance(outputs, ModelOutput) else dict(outputs)
        return [
            {**rest, "logits": average.logits(), **average.uncertainties()}
            for rest, average in zip(others, averages, strict=True)
        ]

    def function(self, postprocess_params: dict[str, Any]) -> str:
        """Return what makes scores of logits: "softmax", "sigmoid" or "none", by the rule of the pipelines."""
        given = postprocess_params.get("function_to_apply")
        if given is not None:
            return str(given.value)
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        one_by_one = config.problem_type == "multi_label_classification" or config.num_labels == 1
        return "sigmoid" if one_by_one else "softmax"

    def judge(self, row: dict[str, Any], key: str, uncertainties: dict[str, float]) -> None:
        """Add the uncertainties to a result, and take its label away if they are too large."""
        row.update(uncertainties)
        if self.abstain_above is not None:
            row["abstained"] = not row[self.abstain_by] <= self.abstain_above  # also if it is not a number
            if row["abstained"]:
                row["withheld"], row[key] = row[key], None


def _same(outputs: Any) -> Any:
    return outputs


class _Classification(_PosteriorPipeline):
    """Of texts and images: results are rows of label and score."""

    def postprocess(self, model_outputs: dict[str, Any], **params: Any) -> Any:
        """Return the base class's result with uncertainties."""
        function = self.function(params)
        result = super().postprocess(model_outputs, **{**params, "function_to_apply": function})
        index = {label: i for i, label in self.model.config.id2label.items()}
        found = {name: model_outputs[name][0] for name in MEASURES[function]}
        for row in result if isinstance(result, list) else [result]:
            label = index[row["label"]]
            self.judge(row, "label", {k: float(v[label] if v.ndim else v) for k, v in found.items()})
        return result


class _TextClassification(_Classification, transformers.TextClassificationPipeline):
    pass


class _ImageClassification(_Classification, transformers.ImageClassificationPipeline):
    pass


class _TokenClassification(_PosteriorPipeline, transformers.TokenClassificationPipeline):
    def function(self, postprocess_params: dict[str, Any]) -> str:
        """Return the function of every tagger."""
        return "softmax"

    def postprocess(
        self, all_outputs: list[dict[str, Any]], aggregation_strategy: Any = AggregationStrategy.NONE, **params: Any
    ) -> Any:
        """Return the base class's tokens or groups of tokens with uncertainties."""
        names = MEASURES["softmax"]
        tokens = [token for outputs in all_outputs for token in self._tokens(all_outputs[0], outputs, names)]
        entities = super().postprocess(all_outputs, aggregation_strategy=aggregation_strategy, **params)
        for entity in entities:
            key = "entity" if "entity" in entity else "entity_group"
            own = [token["scores"] for token in tokens if self._belongs(token, entity)]
            self.judge(entity, key, dict(zip(names, np.max(own, axis=0).tolist(), strict=True)))
        return entities

    def _tokens(self, first: dict[str, Any], outputs: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return tokens with their places in the text, found as the base class does, and uncertainties as `scores`."""
        offsets = outputs["offset_mapping"]
        return self.gather_pre_entities(
            first["sentence"],
            outputs["input_ids"][0],
            torch.stack([outputs[name][0] for name in names], dim=-1).numpy(),
            None if offsets is None else copy.deepcopy(offsets[0]),  # of words given apart it is changed
            outputs["special_tokens_mask"][0].numpy(),
            AggregationStrategy.NONE,
            word_ids=outputs.get("word_ids"),
            word_to_chars_map=first.get("word_to_chars_map"),
        )

    def _belongs(self, token: dict[str, Any], entity: dict[str, Any]) -> bool:
        if "index" in entity:
            return token["index"] == entity["index"]
        if entity["start"] is None:
            raise ValueError(
                f"`aggregation_strategy` must be 'none' with a tokenizer that does not know where tokens are in the "
                f"text, got {type(self.tokenizer).__name__}. Use a fast tokenizer."
            )
        return entity["start"] <= token["start"] and token["end"] <= entity["end"]


_CLASSES = {
    "image-classification": _ImageClassification,
    "ner": _TokenClassification,
    "sentiment-analysis": _TextClassification,
    "text-classification": _TextClassification,
    "token-classification": _TokenClassification,
}
