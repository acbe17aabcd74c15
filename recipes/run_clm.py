"""Train a GPT-2 from scratch with IVON or AdamW; evaluate perplexity at the mean and averaged over the posterior.

    python recipes/run_clm.py --output_dir out --max_steps 200                     # embedded corpus, offline
    python recipes/run_clm.py --output_dir out --train_file a.jsonl.gz --validation_file b.txt
    python recipes/run_clm.py recipes/settings/gpt2_125m_ivon.json --output_dir out    # the paper's setting

The model follows nanoGPT: GELU, no dropout, tied head, no biases. Transformers' GPT-2 has no switch for biases, so
they are set to zero and frozen, which is the same function; `--bias true` trains them.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from hf_ivon import IVONTrainer, IVONTrainingArguments, posterior_perplexity

try:
    from recipes import common, corpus
except ImportError:  # run as a script: this directory is on the path
    import common
    import corpus

END = "<|endoftext|>"
STREAMED_ROWS = 100_000  # of a stream, the first so many train the tokenizer


@dataclass
class ModelArguments:
    """The model and its tokenizer."""

    config_name: str = field(
        default="gpt2", metadata={"help": "GPT-2's default configuration, or a directory with one."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes of the configuration: n_layer=4,n_head=4,n_embd=128"}
    )
    bias: bool = field(default=False, metadata={"help": "Train biases; otherwise they are zero and frozen."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer's name or directory. Default: byte-level BPE trained on the corpus."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Vocabulary of the tokenizer that is trained; 2048 unless given."}
    )


@dataclass
class DataArguments:
    """The text, and how it is cut and evaluated."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, such as Skylion007/openwebtext."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Read that dataset as a stream; needs max_steps and ivon_ess."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training text: txt, json, jsonl or csv, also .gz."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation text; default: the last 5%% of training."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    block_size: int = field(
        default=1024, metadata={"help": "Tokens in a training sequence, at most the model's context."}
    )
    max_eval_blocks: int = field(default=500, metadata={"help": "Most validation sequences."})
    eval_num_samples: int = field(
        default=16, metadata={"help": "Weight samples of the posterior-averaged perplexity."}
    )


def check_arguments(model: ModelArguments, data: DataArguments, args: IVONTrainingArguments) -> None:
    """Raise a `RecipeError` for values out of range, and for flags that would have no effect."""
    least = {"block_size": 2, "max_eval_blocks": 1, "eval_num_samples": 0}
    for name, bound in least.items():
        if getattr(data, name) < bound:
            raise common.RecipeError(f"`{name}` must be at least {bound}, got {getattr(data, name)}. Correct it.")
    if model.vocab_size is not None and model.vocab_size < 257:
        raise common.RecipeError(
            f"`vocab_size` must be at least 257, the bytes and the end of text, got {model.vocab_size}. Raise it."
        )
    needs = {
        "dataset_config_name": "dataset_name",
        "streaming": "dataset_name",
        "validation_file": "train_file",
    }
    for name, other in needs.items():
        if getattr(data, name) and not getattr(data, other):
            raise common.RecipeError(f"`{name}` must come with `{other}`, which is not given. Add it.")
    for names in (("dataset_name", "train_file"), ("tokenizer_name", "vocab_size")):
        given = {**vars(model), **vars(data)}
        if all(given[name] is not None for name in names):
            raise common.RecipeError(f"`{names[0]}` and `{names[1]}` exclude each other. Give one of them.")
    if data.streaming and args.max_steps <= 0:
        raise common.RecipeError("`max_steps` must be given for a streamed dataset, which has no length. Add it.")


def load_text(args: DataArguments) -> tuple[Any, Any]:
    """Return training and validation rows with a text column, from the Hub, from files, or from Python itself."""
    import datasets

    if args.dataset_name is not None:
        with common.from_hub("dataset_name", args.dataset_name, "a dataset"):
            splits = datasets.load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
        if "train" not in splits:
            raise common.RecipeError(
                f"The dataset {args.dataset_name!r} must have a split `train`, got {', '.join(splits)}. Take one."
            )
        train = common.check_rows(splits["train"], [args.text_column], repr(args.dataset_name))
        if "validation" in splits:
            return train, splits["validation"]
        if args.streaming:
            return train.skip(1000), train.take(1000)
    elif args.train_file is not None:
        train = common.load_rows(args.train_file, [args.text_column])
        if args.validation_file is not None:
            return train, common.load_rows(args.validation_file, [args.text_column])
    else:
        documents = corpus.python_documentation()
        rows = {split: datasets.Dataset.from_dict({args.text_column: texts}) for split, texts in documents.items()}
        return rows["train"], rows["validation"]
    cut = max(1, len(train) // 20)
    if cut >= len(train):
        raise common.RecipeError(
            "The training text has one row, so that none is left for validation. Pass --validation_file."
        )
    return train.select(range(len(train) - cut)), train.select(range(len(train) - cut, len(train)))


def load_tokenizer(args: ModelArguments, rows: Any, column: str) -> Any:
    """Return the named tokenizer, or a byte-level BPE trained on the rows."""
    if args.tokenizer_name is not None:
        with common.from_hub("tokenizer_name", args.tokenizer_name, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        if tokenizer.eos_token_id is None:
            raise common.RecipeError(
                f"`tokenizer_name` must have an end-of-text token, got {args.tokenizer_name!r}. Choose another."
            )
        return tokenizer
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    if not hasattr(rows, "__len__"):
        rows = rows.take(STREAMED_ROWS)
    texts = (row[column] for row in rows if row[column])
    size = 2048 if args.vocab_size is None else args.vocab_size
    tokenizer.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, bos_token=END)


def pack(rows: Any, tokenizer: Any, column: str, block_size: int) -> Any:
    """Return the rows as blocks of tokens: documents joined by the end token, the last partial block dropped."""

    def to_blocks(batch: dict[str, list]) -> dict[str, list]:
        ids = tokenizer([t for t in batch[column] if t], verbose=False)["input_ids"]
        stream = [i for document in ids for i in [*document, tokenizer.eos_token_id]]
        blocks = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    # Of a stream the other columns may not be known before it is read.
    rows = rows.select_columns([column])
    return rows.map(to_blocks, batched=True, batch_size=10_000, remove_columns=[column])


def build_model(args: ModelArguments, tokenizer: Any, block_size: int) -> GPT2LMHeadModel:
    """Return a fresh GPT-2 in nanoGPT's choices."""
    if args.config_name == "gpt2":
        config = AutoConfig.for_model("gpt2")
    else:
        with common.from_hub("config_name", args.config_name, "a model"):
            config = AutoConfig.from_pretrained(args.config_name)
        if config.model_type != "gpt2":
            raise common.RecipeError(
                f"`config_name` must be of a GPT-2, got one of {config.model_type}. Choose another."
            )
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": len(tokenizer)})
    config.update({"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
    if args.config_overrides:
        try:
            config.update_from_string(args.config_overrides)
        except ValueError as err:
            raise common.RecipeError(
                f"`config_overrides` must be 'name=value,...' of the configuration: {err}."
            ) from err
    if block_size > config.n_positions:
        raise common.RecipeError(
            f"`block_size` must be at most the model's context of {config.n_positions}, got {block_size}. Pass "
            f"--block_size {config.n_positions}, or --config_overrides n_positions={block_size}."
        )
    model = GPT2LMHeadModel(config)
    if not args.bias:
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.requires_grad_(False).zero_()
    return model


class Clock(TrainerCallback):
    """Notes in each record of the log how many seconds training has taken, without evaluations."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start; after a checkpoint, from its time on."""
        earlier = [record["train_seconds"] for record in state.log_history if "train_seconds" in record]
        self.start = time.perf_counter() - (earlier[-1] if earlier else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        record = state.log_history[-1]
        self.start += record.get("eval_runtime", 0.0)
        record["train_seconds"] = time.perf_counter() - self.start


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and evaluate; return what `results.json` holds."""
    model_args, data_args, args = common.parse_args((ModelArguments, DataArguments, IVONTrainingArguments), argv)
    common.check_output_dir(args)
    check_arguments(model_args, data_args, args)
    set_seed(args.seed)
    train_rows, validation_rows = load_text(data_args)
    tokenizer = load_tokenizer(model_args, train_rows, data_args.text_column)
    model = build_model(model_args, tokenizer, data_args.block_size)
    train = pack(train_rows, tokenizer, data_args.text_column, data_args.block_size)
    validation = pack(validation_rows, tokenizer, data_args.text_column, data_args.block_size)
    if data_args.streaming:
        validation = list(validation.take(data_args.max_eval_blocks))
    else:
        for name, blocks in (("training", train), ("validation", validation)):
            if len(blocks) == 0:
                raise common.RecipeError(
                    f"The {name} text gives no block of {data_args.block_size} tokens. Pass a smaller --block_size."
                )
        validation = validation.select(range(min(len(validation), data_args.max_eval_blocks)))
    trainer = IVONTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()  # the log, from which `hf-ivon inspect --plots` draws the run
    results = evaluate(trainer, validation, data_args.eval_num_samples, args)
    results["history"] = trainer.state.log_history
    common.write_results(args.output_dir, results)
    averaged = results.get("averaged", {}).get("perplexity")
    rows = [[results["optimizer"], results["mean"]["perplexity"], averaged]]
    print(common.table(rows, ["optimizer", "perplexity (mean)", f"averaged ({data_args.eval_num_samples} samples)"]))
    return results


def evaluate(trainer: IVONTrainer, validation: Any, num_samples: int, args: IVONTrainingArguments) -> dict[str, Any]:
    """Return the validation perplexity at the mean, and averaged over the posterior if there is one."""
    loader = DataLoader(validation, batch_size=args.per_device_eval_batch_size, collate_fn=default_data_collator)
    at_mean = posterior_perplexity(trainer.model, None, loader, num_samples=0)
    results = {
        "optimizer": getattr(args.optim, "value", args.optim),
        "mean": {name: at_mean[name] for name in ("perplexity", "nll")},
        "num_eval_tokens": at_mean["num_tokens"],
        "num_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "max_steps": trainer.state.max_steps,
        "seed": args.seed,
    }
    if trainer.ivon is not None and num_samples > 0:
        averaged = posterior_perplexity(
            trainer.model, trainer.posterior(), loader, num_samples=num_samples, seed=args.seed
        )
        results["averaged"] = {name: averaged[name] for name in ("perplexity", "nll")}
        results["num_samples"] = num_samples
    return results


if __name__ == "__main__":
    common.main_guard(main)
