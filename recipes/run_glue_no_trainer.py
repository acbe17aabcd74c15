"""Finetune on a GLUE task in a plain loop with Accelerate, with IVON; evaluate at the mean and averaged.

    accelerate launch recipes/run_glue_no_trainer.py --model_name_or_path roberta-base --task_name mrpc \
        --learning_rate 0.1 --output_dir out

The loop is the usual one; what IVON adds is `sampled_params` around forward and backward, and the posterior's files at
the end. `--checkpointing_steps` writes states that `--resume_from_checkpoint` continues bit for bit.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from hf_ivon import IVON, Posterior, posterior_predict, save_posterior
from hf_ivon.training.accelerate import sampled_params, unwrap_ivon

try:
    from recipes import common, run_glue
except ImportError:  # run as a script: this directory is on the path
    import common
    import run_glue


@dataclass
class LoopArguments:
    """The loop and its optimizer; names as in Transformers' `TrainingArguments`."""

    output_dir: str = field(metadata={"help": "Where checkpoints, the model and its posterior go."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=1e-5, metadata={"help": "Prior precision per example."})
    ess: float | None = field(default=None, metadata={"help": "Effective sample size; default: training examples."})
    hess_init: float = field(default=1.0, metadata={"help": "Start value of the Hessian."})
    beta2: float = field(default=0.99999, metadata={"help": "Decay of the Hessian average."})
    clip_radius: float = field(default=1e-3, metadata={"help": "Element-wise bound of the Newton step."})
    mc_samples: int = field(default=1, metadata={"help": "Weight samples per micro-batch."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clipping of the mean's gradient; 0 is off."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Examples in a micro-batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples in an evaluation batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches in a step."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training set."})
    max_steps: int = field(default=-1, metadata={"help": "Most optimizer steps; -1: as the epochs have."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rate rises from 0."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is an accelerator."})
    seed: int = field(default=42, metadata={"help": "Seed of data order, head, dropout and weight noise."})
    checkpointing_steps: int = field(default=0, metadata={"help": "Steps between two saved states; 0: none."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A saved state to continue."})


def check_arguments(args: LoopArguments) -> None:
    """Refuse numbers that the loop cannot use.

    Raises:
        RecipeError: If one is out of range.
    """
    least = {"gradient_accumulation_steps": 1, "mc_samples": 1, "num_train_epochs": 1, "checkpointing_steps": 0}
    least |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "warmup_steps": 0}
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            raise common.RecipeError(
                f"`{name}` must be at least {smallest}, got {getattr(args, name)}. Leave out --{name} for the default."
            )


def train(accelerator: Accelerator, args: LoopArguments, model: Any, optimizer: Any, loader: Any) -> int:
    """Train; return the number of optimizer steps."""
    per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else args.num_train_epochs * per_epoch
    # Accelerate steps the prepared scheduler once for every process.
    scale = accelerator.num_processes
    scheduler = accelerator.prepare(
        get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps * scale, total * scale)
    )
    step = 0
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)
        step = int(Path(args.resume_from_checkpoint).name.rpartition("-")[2])
    model.train()
    while step < total:
        epoch, done = divmod(step, per_epoch)
        batches = skip_first_batches(loader, done * args.gradient_accumulation_steps) if done else loader
        batches.set_epoch(epoch)
        for batch in batches:
            with accelerator.accumulate(model):
                for _ in range(args.mc_samples):
                    with sampled_params(accelerator, optimizer, weight=1.0 / args.mc_samples):
                        accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if args.checkpointing_steps and step % args.checkpointing_steps == 0:
                accelerator.save_state(str(Path(args.output_dir) / f"step-{step}"))
            if step == total:
                break
    return step


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Finetune and evaluate; return what `results.json` holds."""
    glue, args = common.parse_args((run_glue.GlueArguments, LoopArguments), argv)
    run_glue.check_arguments(glue)
    check_arguments(args)
    common.check_output_dir(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=args.use_cpu,
        # The order of an epoch is then a function of seed and epoch, so that a resumed run sees the same.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    with accelerator.main_process_first():  # the others read what the first has put into the cache
        model, tokenizer, train_set, validation, collator = run_glue.prepare(glue)
    optimizer = IVON(
        model.named_parameters(),
        lr=args.learning_rate,
        ess=float(len(train_set)) if args.ess is None else args.ess,
        hess_init=args.hess_init,
        beta2=args.beta2,
        weight_decay=args.weight_decay,
        clip_radius=args.clip_radius,
        mc_samples=args.mc_samples,
        seed=args.seed,
    )
    own = torch.Generator()  # iterating must not draw from the generator of dropout: a resumed run starts elsewhere
    loader = DataLoader(train_set, args.per_device_train_batch_size, shuffle=True, collate_fn=collator, generator=own)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = train(accelerator, args, prepared, optimizer, loader)
    results: dict[str, Any] = {"task": glue.task_name, "optimizer": "ivon", "seed": args.seed, "max_steps": steps}
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(prepared)
        posterior = Posterior.from_optimizer(unwrap_ivon(optimizer), model, num_examples=len(train_set))
        save_posterior(posterior, args.output_dir)
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        batches = DataLoader(validation, args.per_device_eval_batch_size, collate_fn=collator)
        for name, given, samples in (("mean", None, 0), ("averaged", posterior, glue.eval_num_samples)):
            if name == "mean" or samples:
                prediction = posterior_predict(model, given, batches, num_samples=samples, seed=args.seed)
                results[name] = run_glue.evaluate(glue.task_name, prediction)
                results["num_samples"] = prediction.num_samples
        common.write_results(args.output_dir, results)
        run_glue.print_results(results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


if __name__ == "__main__":
    common.main_guard(main)
