"""Evaluation and prediction by a Trainer, averaged over the posterior that it is learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from hf_ivon.averaging import ScoreAverage

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_ivon.optim import IVON

_PADDING = -100


class EvaluationMixin:
    """`evaluate` and `predict` of a Trainer at `ivon_eval_num_samples` weight samples; at 0 nothing changes.

    The logits returned are those of the averaged scores: their softmax is the averaged probabilities (multi-label:
    their sigmoid; regression: they themselves). The loss is the average of the samples' losses, which is not below the
    loss of the average.

    Each weight sample is drawn once for a pass over the data. Where the logits of a pass are not kept, or the data
    cannot be read again, each batch has samples of its own: with `preprocess_logits_for_metrics`,
    `batch_eval_metrics`, `eval_do_concat_batches=False` and iterable datasets.
    """

    args: TrainingArguments
    model: nn.Module
    compute_metrics: Any
    is_in_train: bool
    _in_pass = False

    @property
    def ivon(self) -> IVON | None:
        """The IVON optimizer; None before training, or if the optimizer is another one."""
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the base class's loop once for each weight sample, and compute the metrics of the average.

        Relies on `evaluate` and `predict` going through this method, and on the base class calling `compute_metrics`
        at most once, at the end.

        Args:
            dataloader: Batches, in the same order each time.
            description: Of the run, for the log.
            prediction_loss_only: Whether only the loss is wanted.
            ignore_keys: Outputs of the model that are not wanted.
            metric_key_prefix: What the names of metrics begin with.

        Returns:
            Averaged predictions, labels and metrics.

        Raises:
            RuntimeError: If there is no posterior yet.
            ValueError: If the outputs cannot be averaged: generated tokens, or several tensors.
        """
        samples = self._eval_samples()
        given = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not samples or not self._passes_are_whole(dataloader):
            return super().evaluation_loop(*given)  # type: ignore[misc]
        ivon = self._posterior()
        self._cast_for_evaluation()
        compute, seen, outputs, average = self.compute_metrics, [], [], None

        def record(prediction: EvalPrediction) -> dict[str, float]:
            seen.append(prediction)
            return {}

        self.compute_metrics, self._in_pass = compute and record, True
        try:
            for index in range(samples):
                # A data loader draws a seed each time; training shall go on as after one.
                with torch.random.fork_rng([], enabled=index > 0), ivon.sampled_params():
                    output = super().evaluation_loop(*given)  # type: ignore[misc]
                if output.predictions is not None:
                    logits = torch.as_tensor(output.predictions)
                    average = average or ScoreAverage(_score_function(self.model, logits))
                    average.add(logits)
                outputs.append(output._replace(predictions=None))
        finally:
            self.compute_metrics, self._in_pass = compute, False
        last = outputs[-1]
        metrics = {key: float(np.mean([output.metrics[key] for output in outputs])) for key in last.metrics}
        predictions = average and _padded_as(logits, average.logits().to(logits.dtype)).numpy()
        if seen:
            losses = None if seen[-1].losses is None else np.mean([one.losses for one in seen], axis=0)
            computed = compute(
                EvalPrediction(
                    predictions=predictions, label_ids=seen[-1].label_ids, inputs=seen[-1].inputs, losses=losses
                )
            )
            for key, value in denumpify_detensorize(computed).items():
                metrics[key if key.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{key}"] = value
        return last._replace(predictions=predictions, metrics=metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Run the base class's step; where no sample holds for the whole pass, at `ivon_eval_num_samples` new ones.

        Args:
            model: The model.
            inputs: One batch.
            prediction_loss_only: Whether only the loss is wanted.
            ignore_keys: Outputs of the model that are not wanted.

        Returns:
            Loss, logits and labels, as the base class gives them.

        Raises:
            RuntimeError: If there is no posterior yet.
            ValueError: If the outputs cannot be averaged: generated tokens, or several tensors.
        """
        samples = self._eval_samples()
        if self._in_pass or not samples:
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
            if samples and result[1] is not None:
                _score_function(self.model, result[1])  # what cannot be averaged shows in the first batch
            return result
        losses, average, labels = [], None, None
        for _ in range(samples):
            with self._posterior().sampled_params():
                # A step may change its inputs.
                step = super().prediction_step(model, dict(inputs), prediction_loss_only, ignore_keys)  # type: ignore[misc]
            loss, logits, labels = step
            if loss is not None:
                losses.append(loss)
            if logits is not None:
                average = average or ScoreAverage(_score_function(self.model, logits))
                average.add(logits)
        return torch.stack(losses).mean() if losses else None, average and average.logits().to(logits.dtype), labels

    def _eval_samples(self) -> int:
        return getattr(self.args, "ivon_eval_num_samples", 0) if self.args.optim == "ivon" else 0

    def _cast_for_evaluation(self) -> None:
        """Cast the mean as the base class is about to do: cast inside a sample, the model would keep the sample."""
        half = self.args.fp16_full_eval
        if (half or self.args.bf16_full_eval) and not self.is_in_train:
            self.model.to(dtype=torch.float16 if half else torch.bfloat16, device=self.args.device)

    def _posterior(self) -> IVON:
        if self.ivon is None:
            raise RuntimeError(
                "There is no posterior to average over before training. Leave out `ivon_eval_num_samples`, or "
                "average over a saved one by `posterior_predict`."
            )
        return self.ivon

    def _passes_are_whole(self, dataloader: DataLoader) -> bool:
        """Tell whether a pass can be repeated, and leaves the logits that are to be averaged."""
        kept = self.args.eval_do_concat_batches and not self.args.batch_eval_metrics
        kept = kept and getattr(self, "preprocess_logits_for_metrics", None) is None
        return kept and not isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def _padded_as(padded: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Put the base class's -100 back where it filled up shorter batches: averaged, it looks like a prediction."""
    return logits.masked_fill((padded == _PADDING).all(dim=-1, keepdim=True), _PADDING)


def _score_function(model: nn.Module, logits: Any) -> str:
    """Return the function of `ScoreAverage` for a model's logits."""
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        found = f"{logits.dtype} numbers" if isinstance(logits, torch.Tensor) else f"{len(logits)} outputs"
        raise ValueError(
            f"`ivon_eval_num_samples` must be 0 for a model whose predictions are not logits alone, got {found}. "
            f"Ignore other outputs by `keys_to_ignore_at_inference`, and do not generate."
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "regression" or logits.shape[-1] == 1:
        return "none"
    return "sigmoid" if problem == "multi_label_classification" else "softmax"
