"""A Trainer that trains with weight samples when its optimizer is IVON, and saves the posterior beside the mean."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.trainer_utils import HubStrategy

from hf_ivon import distributed
from hf_ivon.checkpoint import load_posterior, posterior_files, save_posterior
from hf_ivon.hub import write_card
from hf_ivon.mean import posterior_keys
from hf_ivon.optim import IVON
from hf_ivon.posterior import Posterior
from hf_ivon.training.accelerate import grad_scale, unwrap_ivon
from hf_ivon.training.arguments import IVONTrainingArguments, check_supported, preset_of
from hf_ivon.training.ess import (
    TrainingSize,
    check_fisher_sigma,
    precision_of_sigma,
    resolve_batch_size,
    resolve_ess,
    settle_resumed,
    training_size,
)
from hf_ivon.training.evaluation import EvaluationMixin
from hf_ivon.training.loss import StepSize, check_loss_scale

logger = logging.getLogger(__name__)

# What the card says of training, beside what `posterior_config.json` holds.
_CARD_SETTINGS = ("clip_radius", "mc_samples")
# Largest movement of a weight in one step below which training all but stands still; AdamW's is its learning rate.
_SMALL_STEP = 1e-6
# The prior precision, this very object, of a parameter group that was made without one.
_UNSAID = inspect.signature(IVON).parameters["weight_decay"].default


class IVONTrainerMixin(EvaluationMixin):
    """IVON for any Trainer class: put it before the Trainer in the bases, and pass `IVONTrainingArguments`.

    With another optimizer nothing changes.
    """

    _size: TrainingSize | None = None
    _step_size: StepSize | None = None
    _restored: tuple[int, Posterior] | None = None
    _loss_checked = False
    _reported: tuple[Any, ...] = ()  # pushes that failed

    @property
    def ivon(self) -> IVON | None:
        """The IVON optimizer; None before training, or if the optimizer is another one."""
        return unwrap_ivon(self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create IVON if the arguments ask for it, over all trainable parameters; otherwise as the base class does.

        Relies on the base class calling this before `accelerator.prepare` and before any training, on an optimizer
        that was given or made earlier standing in `self.optimizer` then, and on the base class making the groups.

        Args:
            model: The model to optimize; None is the Trainer's.

        Returns:
            The optimizer.

        Raises:
            ValueError: If IVON does not support what the arguments ask for, or `ess` cannot be resolved.
        """
        given = () if model is None else (model,)  # earlier releases, and overrides, take none
        asked = self.optimizer is None and self.optimizer_cls_and_kwargs is None and self.args.optim == "ivon"
        if asked:
            check_supported(self.args)
            options = self._ivon_options(self.model if model is None else model)
            prior_on, weight_decay = options.pop("prior_on"), options.pop("weight_decay")
            with _handler(lambda context: (IVON, {**context.optimizer_kwargs, **options})):
                said, self.args.weight_decay = self.args.weight_decay, weight_decay
                try:
                    super().create_optimizer(*given)
                finally:
                    self.args.weight_decay = said
            if self.ivon is None:
                raise ValueError(
                    f"`{type(self).__name__}.create_optimizer` must make what `optim` names, got "
                    f"{type(self.optimizer).__name__} for 'ivon'. Call `super().create_optimizer()` in it."
                )
            names = {p: name for name, p in self.model.named_parameters()}
            for group in self.ivon.param_groups:
                group["param_names"] = [names.get(p, f"parameter {i}") for i, p in enumerate(group["params"])]
                # The base class's group without decay; or a group of an override, which says nothing of it.
                flat, unsaid = group["weight_decay"] == 0.0, group["weight_decay"] is _UNSAID
                if unsaid or (flat and prior_on == "all"):
                    group["weight_decay"] = weight_decay
            return self.optimizer
        super().create_optimizer(*given)
        if self.ivon is not None:
            check_supported(self.args)
            _check_saved(self.model)
            self._size = self._size or training_size(self)
            if self._step_size is not None:  # again, maybe with smaller batches: `auto_find_batch_size`
                size = resolve_batch_size(self, self._size, IVONTrainingArguments.ivon_options(self.args))
                for group in self.ivon.param_groups:
                    group["batch_size"] = size
        elif not isinstance(self.args, IVONTrainingArguments):
            logger.warning(
                "%s trains with %r and without a posterior, because `args` is a %s. Pass IVONTrainingArguments to "
                "train with IVON; with them, `optim` may name any optimizer.",
                type(self).__name__,
                str(getattr(self.args.optim, "value", self.args.optim)),
                type(self.args).__name__,
            )
        return self.optimizer

    def _ivon_options(self, model: nn.Module) -> dict[str, Any]:
        """Return what IVON is made with, beside parameters and learning rate; `ess` is a number. Also `prior_on`."""
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("The model must have trainable parameters, got none. Unfreeze some, or add an adapter.")
        without_prior = self.args.weight_decay == 0 and not isinstance(self.args, IVONTrainingArguments)
        if without_prior:  # 0, the usual default, would be no prior
            self.args.weight_decay = preset_of(self.args)["weight_decay"]
        # Called by its class: the script's own arguments, or those read from `training_args.bin`, are plain ones.
        options = IVONTrainingArguments.ivon_options(self.args)
        lr = self.args.learning_rate
        if 0 < lr * options["clip_radius"] < _SMALL_STEP:
            logger.warning(
                "With learning_rate=%g and clip_radius=%g no weight moves by more than %.1g in a step, which is "
                "hardly training. Learning rates of AdamW are too small for IVON: 0.1 is usual in finetuning.",
                lr,
                options["clip_radius"],
                lr * options["clip_radius"],
            )
        _check_saved(self.model)
        self._size = training_size(self)
        options["ess"] = resolve_ess(self, self._size, options)
        by_step = options["batch_size"] == "auto" and options["hess_approx"] == "fisher"
        options["batch_size"] = resolve_batch_size(self, self._size, options)
        self._step_size = StepSize(self._size) if by_step else None
        options["weight_decay"] = self.args.weight_decay
        if options["relative_sigma"]:
            options |= precision_of_sigma(model, options)
        else:
            check_fisher_sigma(model, options)
        if without_prior:
            flat = "" if options["hess_approx"] == "fisher" else ", tiny for a flat prior"
            logger.warning(
                "The prior precision `weight_decay` is set to %.3g. Pass a --weight_decay for another one%s.",
                options["weight_decay"],
                flat,
            )
        del options["relative_sigma"], options["temperature"]
        return options

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the base class's step, forward and backward, at `mc_samples` weight samples.

        Relies on the base class scaling the loss of each micro-batch so that gradients add up, which is made sure of
        first (`check_loss_scale`).

        Args:
            model: The model.
            inputs: One micro-batch.
            num_items_in_batch: Number of items that the loss of the whole step averages over.

        Returns:
            The loss, averaged over the samples, detached.
        """
        ivon = self.ivon
        if ivon is None or ivon.is_sampled:
            return super().training_step(model, inputs, num_items_in_batch)
        self._loss_checked = self._loss_checked or check_loss_scale(self, model, inputs, num_items_in_batch)
        items = None if self._step_size is None else self._step_size.items(self, inputs)
        samples = ivon.param_groups[0]["mc_samples"]
        losses = []
        for left in reversed(range(samples)):
            batch = copy.copy(inputs) if left else inputs  # a step may change its inputs
            with ivon.sampled_params(train=True, weight=1.0 / samples, grad_scale=grad_scale(self.accelerator)):
                losses.append(super().training_step(model, batch, num_items_in_batch))
        if self._step_size is not None:
            self._step_size.add(self, items, num_items_in_batch)
        return losses[0] if samples == 1 else torch.stack(losses).mean()

    def posterior(self) -> Posterior:
        """Return the posterior at this moment.

        Returns:
            Variances of the trained parameters with what they were learnt with; tensors on the CPU.

        Raises:
            RuntimeError: If the optimizer is not IVON, or does not exist before `train()`.
        """
        ivon = self.ivon
        if ivon is None:
            raise RuntimeError("There is no posterior: the optimizer is not IVON yet. Train with optim='ivon' first.")
        if self._restored is not None and self._restored[0] == ivon.param_groups[0]["window"]:
            return self._restored[1]
        config = getattr(self.model, "config", None)
        return Posterior.from_optimizer(
            ivon,
            self.model,
            num_examples=None if self._size is None else self._size.num_examples,
            num_tokens=None if self._size is None else self._size.num_tokens,
            base_model=getattr(config, "_name_or_path", None) or None,
            base_revision=getattr(config, "_commit_hash", None),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the mean as the base class does, with the posterior beside it.

        Relies on every way of saving, and every push, going through this method. The posterior comes first, because
        the base class may push at the end.

        Args:
            output_dir: Where to; None is the output directory.
            _internal_call: Whether a checkpoint or a push is being made.
        """
        if self.ivon is not None:
            sharded = any(distributed.is_sharded(p) for p in self.model.parameters())
            if self.args.should_save or sharded:  # a sharded one is gathered, by all processes
                posterior = self.posterior()
                if self.args.should_save:
                    save_posterior(posterior, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Bring posterior and card along: the base class copies a fixed list of files into the directory it uploads.

        Relies on the base class pushing under the conditions that stand here; without a push nothing is copied, so
        that the posterior never stands beside another mean. With `hub_always_push` an upload that is under way is
        waited for, as it reads the files that are replaced here.
        """
        if self.ivon is not None and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
            if self.args.hub_always_push or not busy:
                self._finish_current_push()
                _replace_posterior(Path(checkpoint_folder), Path(self.args.output_dir))
                self._write_card(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Wait as the base class does, which says nothing of pushes that failed in the background."""
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Warn once of each push that failed in the background; the next one uploads what is missing."""
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            known = not job.done() or job.cancelled() or job in self._reported
            if not known and (error := job.exception()) is not None:
                self._reported += (job,)
                logger.warning(
                    "A push in the background failed: %s. Nothing is lost: its files are in %r, and the next push "
                    "uploads what is missing.",
                    error,
                    self.args.output_dir,
                )

    def _write_card(self, source: str) -> None:
        """Write the posterior's part of the card; a README that cannot be read does not stop training."""
        ivon = self.ivon
        assert ivon is not None  # asked before
        group = ivon.param_groups[0]
        values = {"learning_rate": group.get("initial_lr", self.args.learning_rate)} | {
            name: group[name] for name in _CARD_SETTINGS
        }
        training = {name: value if math.isfinite(value) else "inf" for name, value in values.items()}
        try:
            write_card(
                self.args.output_dir, self.hub_model_id or self.args.hub_model_id, source=source, training=training
            )
        except (ValueError, OSError) as err:
            logger.warning("The model card is written without the posterior: %s", err)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's state as the base class does, which says nothing where there is none.

        As with every optimizer its options are loaded too; what only predictions depend on is as it is asked for now.
        """
        ivon = self.ivon
        asked = [] if ivon is None else [dict(group) for group in ivon.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and ivon is not None:
            options = IVONTrainingArguments.ivon_options(self.args)
            settle_resumed(asked, ivon.param_groups, options)
            by_step = options["batch_size"] == "auto" and ivon.param_groups[0]["hess_approx"] == "fisher"
            if by_step != (self._step_size is not None) and self._size is not None:
                self._step_size = StepSize(self._size) if by_step else None
        if checkpoint is not None and ivon is not None and not any("hess" in s for s in ivon.state.values()):
            logger.warning(
                "%r holds no state of the optimizer (`save_only_model`), so that only the weights are resumed: the "
                "Hessian starts again from `hess_init`, and the noise from its seed; the posterior there is not read. "
                "To continue a run, save without `save_only_model`.",
                checkpoint,
            )

    def _load_best_model(self) -> None:
        """Restore the Hessian that belongs to the best mean; the base class loads the mean alone."""
        super()._load_best_model()
        ivon, best = self.ivon, self.state.best_model_checkpoint
        if ivon is None or not os.path.isdir(best):
            return
        posterior = load_posterior(best, self.model).to("cpu")  # read now: the checkpoint may be deleted
        with torch.no_grad():
            for name, p in posterior_keys(self.model).items():
                if name in posterior.variance:
                    distributed.copy_full_(ivon.state[p]["hess"], posterior.hess(name))
        # Saved again, the variances shall be the file's to the last bit, which a way through `hess` could round.
        self._restored = (ivon.param_groups[0]["window"], posterior)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the base class does; records of the training loss also get statistics of the posterior.

        Args:
            logs: What to log, changed in place.
            args: Passed on.
            kwargs: Passed on.
        """
        if self.ivon is not None and "loss" in logs and not self.ivon.is_sampled:
            logs["ivon_ess"] = self.ivon.param_groups[0]["ess"]
            logs.update({f"ivon_{name}": value for name, value in self.ivon.statistics().items()})
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card as the base class does, and into it what the posterior is, if one was saved beside it.

        Relies on the base class writing `README.md` into the output directory.

        Args:
            args: Passed on.
            kwargs: Passed on.
        """
        super().create_model_card(*args, **kwargs)
        if self.ivon is not None and self.is_world_process_zero() and posterior_files(self.args.output_dir):
            self._write_card(self.args.output_dir)


class IVONTrainer(IVONTrainerMixin, Trainer):
    """Transformers' Trainer with IVON; takes `IVONTrainingArguments`."""


def _check_saved(model: nn.Module) -> None:
    """Refuse a model whose own file holds none of the trained weights, as the posterior could not stand beside it.

    Raises:
        ValueError: If that is so.
    """
    if not any(p.requires_grad for p in posterior_keys(model).values()):
        kinds = {type(config).__name__ for config in getattr(model, "peft_config", {}).values()}
        raise ValueError(
            f"The model must be saved with the weights that are trained, got {type(model).__name__} with "
            f"{', '.join(sorted(kinds)) or 'none of them'}, which saves what it makes of them. Use an adapter such as "
            f"LoRA in place of prompt or prefix tuning, or choose another `optim`."
        )


@contextmanager
def _handler(handler: Callable[[Any], tuple[type, dict[str, Any]]]) -> Generator[None, None, None]:
    """Let the base class make "ivon", which it does not know, from what the handler returns."""
    earlier = _OPTIMIZER_HANDLERS.get("ivon")
    _OPTIMIZER_HANDLERS["ivon"] = handler
    try:
        yield
    finally:
        del _OPTIMIZER_HANDLERS["ivon"]
        if earlier is not None:
            _OPTIMIZER_HANDLERS["ivon"] = earlier


def _replace_posterior(source: Path, target: Path) -> None:
    """Copy the posterior's files, each to a temporary name first; files of an earlier save are removed."""
    target.mkdir(parents=True, exist_ok=True)
    files = posterior_files(source)
    for file in files:
        temporary = target / f".{file.name}.tmp"
        shutil.copyfile(file, temporary)
        os.replace(temporary, target / file.name)
    for file in set(posterior_files(target)) - {target / f.name for f in files}:
        file.unlink()
