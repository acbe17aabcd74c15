"""Finetune a causal language model with LoRA and IVON; save the posterior beside the adapter.

    python recipes/run_sft_lora.py recipes/settings/ivon_lora.json --model_name_or_path meta-llama/Llama-3.2-1B \
        --train_file train.jsonl --validation_file validation.jsonl --output_dir out

The trainer is TRL's `SFTTrainer`, unchanged: `import hf_ivon.auto` gives it IVON. Rows have a `text`, or `prompt` and
`completion` (the loss is then on the completion), or `messages`. The settings file is IVON-LoRA's (arXiv:2411.04421).
"""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import hf_ivon.auto  # noqa: F401
from hf_ivon import posterior_perplexity

try:
    from recipes import common
except ImportError:  # run as a script: this directory is on the path
    import common

_FORMATS = (("text",), ("prompt", "completion"), ("messages",))


@dataclass
class LoraArguments:
    """Model, adapter and data."""

    model_name_or_path: str = field(metadata={"help": "Pretrained causal language model."})
    train_file: str = field(metadata={"help": "Training rows: json, jsonl or csv, also .gz."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation rows, for the perplexity."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter, divided by its rank."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. Default: what PEFT has for the model."}
    )
    eval_num_samples: int = field(default=10, metadata={"help": "Weight samples of the averaged perplexity."})


def load(path: str) -> Any:
    """Return the rows of a file in one of the formats that the trainer knows."""
    rows = common.load_rows(path, [])
    if not any(set(columns) <= set(rows.column_names) for columns in _FORMATS):
        wanted = " or ".join(" and ".join(columns) for columns in _FORMATS)
        raise common.RecipeError(f"The data in {path!r} must have {wanted}, it has {', '.join(rows.column_names)}.")
    return rows


def build_model(args: LoraArguments) -> tuple[Any, Any]:
    """Return the model with a fresh adapter, and its tokenizer."""
    with common.from_hub("model_name_or_path", args.model_name_or_path, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
    )
    try:
        return get_peft_model(model, config), tokenizer
    except ValueError as err:
        raise common.RecipeError(f"The adapter does not fit the model: {err} Pass --lora_target_modules.") from err


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Finetune and evaluate; return what `results.json` holds."""
    lora, args = common.parse_args((LoraArguments, SFTConfig), argv)
    common.check_output_dir(args)
    rows = {"train": load(lora.train_file)}
    if lora.validation_file is not None:
        rows["validation"] = load(lora.validation_file)
    set_seed(args.seed)
    model, tokenizer = build_model(lora)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()  # the log, from which `hf-ivon inspect --plots` draws the run
    results: dict[str, Any] = {"optimizer": str(getattr(args.optim, "value", args.optim)), "seed": args.seed}
    if trainer.eval_dataset is not None:
        loader = DataLoader(trainer.eval_dataset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
        at_mean = posterior_perplexity(trainer.model, None, loader, num_samples=0)
        results["mean"] = {"perplexity": at_mean["perplexity"]}
        if results["optimizer"] == "ivon" and lora.eval_num_samples > 0:
            posterior = trainer.posterior()
            averaged = posterior_perplexity(
                trainer.model, posterior, loader, num_samples=lora.eval_num_samples, seed=args.seed
            )
            results["averaged"] = {"perplexity": averaged["perplexity"]}
            results["num_samples"] = lora.eval_num_samples
        header = ["optimizer", "perplexity (mean)", f"averaged ({lora.eval_num_samples} samples)"]
        row = [results["optimizer"], *(results.get(key, {}).get("perplexity") for key in ("mean", "averaged"))]
        print(common.table([row], header))
    common.write_results(args.output_dir, results)
    return results


if __name__ == "__main__":
    common.main_guard(main)
