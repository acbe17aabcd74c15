"""Finetune with IVON and compare the Hessian that it learnt with the exact diagonal at the mean.

    python recipes/curvature_study.py --examples 512 --samples 16 64 -- --task_name sst2 --output_dir out \
        --model_name_or_path roberta-base --ivon_preset finetuning

    python recipes/curvature_study.py --recipe run_clm --examples 256 --samples 16 -- --output_dir out --max_steps 600

What stands after `--` goes to `run_glue.py`, or to the other recipe; a finished run in `output_dir` is measured
without repeating it. The exact diagonal is that of the Gauss-Newton matrix, which for these losses is the Fisher
information, over some training examples; of a language model, whose words are too many for that, labels drawn from it
stand for their average. Two halves of the examples are compared with each other too: what differs between them no
estimate can know.

The first table has, by layer and overall, the share of the weights whose curvature is not zero in the examples, the
rank correlation (Spearman) of learnt and exact with the median over the layer's tensors, the rank correlation of the
halves, learnt over exact (sums), and the share of weights whose learnt value is more than 10% away from `hess_init`.
The second has the quality of the predictions at the mean and averaged over the posterior.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from hf_ivon import IVONTrainingArguments, Posterior, load_posterior, posterior_perplexity, posterior_predict
from hf_ivon.checkpoint import posterior_files
from hf_ivon.curvature import estimate_posterior
from hf_ivon.json_files import write_json
from hf_ivon.parts import layer_of

try:
    from recipes import common, run_clm, run_glue
except ImportError:  # run as a script: this directory is on the path
    import common
    import run_clm
    import run_glue

_MOVED = 0.1
_MAX_WEIGHTS = 200_000  # of each tensor, evenly spaced: ranks of all of them cost more than they tell


@dataclass
class Run:
    """A finished run: its model, what it was trained on, and how its predictions are looked at."""

    model: Any
    train: Any
    collator: Any
    estimator: str
    evaluate: Callable[[Posterior | None, int], dict[str, float]]


@dataclass
class Tensors:
    """Some of a tensor's weights: the learnt Hessian, the exact one, and that of half the examples, twice."""

    learnt: Tensor
    exact: Tensor
    halves: tuple[Tensor, Tensor]
    hess_init: float


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation of two vectors; None where one of them is constant."""
    from scipy.stats import rankdata

    a, b = (torch.as_tensor(rankdata(x.numpy())) for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else None


def summary(group: list[Tensors]) -> list[Any]:
    """Return the columns of the first table for some tensors; weights of zero curvature are left out of the ranks."""
    learnt, exact = (torch.cat([getattr(t, k) for t in group]) for k in ("learnt", "exact"))
    halves = [torch.cat([t.halves[i] for t in group]) for i in (0, 1)]
    initial = torch.cat([torch.full_like(t.learnt, t.hess_init) for t in group])
    moved = ((learnt / initial - 1).abs() > _MOVED).float().mean().item()
    seen = exact > 0
    if not seen.any():
        return [len(exact), 0.0, None, None, None, None, moved]
    single = [rank_correlation(t.learnt[t.exact > 0], t.exact[t.exact > 0]) for t in group]
    known = [s for s in single if s is not None]
    return [
        len(exact),
        seen.float().mean().item(),
        rank_correlation(learnt[seen], exact[seen]),
        statistics.median(known) if known else None,
        rank_correlation(halves[0][seen], halves[1][seen]),
        (learnt[seen].double().sum() / exact[seen].double().sum()).item(),
        moved,
    ]


def pick(tensor: Tensor) -> Tensor:
    """Return evenly spaced weights of a tensor, all of a small one."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _MAX_WEIGHTS)].clone()


def exact_hessians(run: Run, examples: int) -> list[dict[str, Tensor]]:
    """Return the Gauss-Newton diagonals of two halves of some evenly spaced examples."""
    chosen = [i * len(run.train) // examples for i in range(examples)]
    found = []
    for half in (chosen[::2], chosen[1::2]):
        loader = DataLoader(run.train.select(half), batch_size=8, collate_fn=run.collator)
        # Next to no prior: it would swallow the small curvatures that are taken out of the variances again.
        posterior = estimate_posterior(run.model, loader, estimator=run.estimator, weight_decay=1e-20)
        found.append({name: posterior.hess(name) for name in posterior.names()})
    return found


def compare(learnt: Mapping[str, Tensor], halves: list[dict[str, Tensor]], hess_init: Any) -> dict[str, Tensors]:
    """Return the weights to compare, by tensor name."""
    first, second = halves
    return {
        name: Tensors(pick(h), pick((first[name] + second[name]) / 2), (pick(first[name]), pick(second[name])),
                      hess_init(name))
        for name, h in learnt.items()
    }  # fmt: skip


def classifier(glue: run_glue.GlueArguments, args: IVONTrainingArguments) -> Run:
    """Return a finished run of `run_glue.py`."""
    glue.model_name_or_path = str(args.output_dir)
    model, _, train, validation, collator = run_glue.prepare(glue)
    loader = DataLoader(validation, batch_size=args.per_device_eval_batch_size, collate_fn=collator)

    def evaluate(posterior: Posterior | None, num: int) -> dict[str, float]:
        prediction = posterior_predict(model, posterior, loader, num_samples=num, seed=args.seed)
        return run_glue.evaluate(glue.task_name, prediction)

    return Run(model, train, collator, "ggn", evaluate)


def language_model(data: run_clm.DataArguments, args: IVONTrainingArguments) -> Run:
    """Return a finished run of `run_clm.py`."""
    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    train, validation = (
        run_clm.pack(rows, tokenizer, data.text_column, data.block_size) for rows in run_clm.load_text(data)
    )
    some = validation.select(range(min(len(validation), data.max_eval_blocks)))
    loader = DataLoader(some, batch_size=args.per_device_eval_batch_size, collate_fn=default_data_collator)

    def evaluate(posterior: Posterior | None, num: int) -> dict[str, float]:
        found = posterior_perplexity(model, posterior, loader, num_samples=num, seed=args.seed)
        return {name: found[name] for name in ("perplexity", "nll")}

    return Run(model, train, default_data_collator, "squared-gradient", evaluate)


def measure(run: Run, directory: str, own: argparse.Namespace) -> dict[str, Any]:
    """Return rows of both tables for a finished run, whose posterior is in `directory`."""
    if not posterior_files(Path(directory)):
        raise common.RecipeError(f"`output_dir` must hold a posterior, got {directory!r}. Train with --optim ivon.")
    posterior = load_posterior(directory, run.model)
    if not 2 <= own.examples <= len(run.train):
        raise common.RecipeError(
            f"`examples` must be from 2 to the {len(run.train)} training rows, got {own.examples}."
        )
    learnt = {name: posterior.hess(name) for name in posterior.names()}
    tensors = compare(learnt, exact_hessians(run, own.examples), lambda name: posterior.config.of("hess_init", name))
    layers: dict[str, list[Tensors]] = {}
    for name, of_tensor in tensors.items():
        layers.setdefault(layer_of(name), []).append(of_tensor)
    rows = {layer: summary(group) for layer, group in layers.items()}
    rows["overall"] = summary(list(tensors.values()))
    quality = {
        f"{num} samples" if num else "mean": run.evaluate(posterior if num else None, num) for num in [0, *own.samples]
    }
    return {"layers": rows, "quality": quality}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, write `curvature.json` beside the posterior and print both tables."""
    argv, flags = common.split_flags(argv)
    parser = argparse.ArgumentParser(description="Compare the learnt Hessian with the exact one.")
    parser.add_argument("--examples", type=int, default=512, help="training examples of the exact diagonal")
    parser.add_argument("--samples", type=int, nargs="*", default=[16, 64], help="weight samples of the evaluations")
    parser.add_argument("--recipe", choices=["run_glue", "run_clm"], default="run_glue", help="what is trained")
    own = parser.parse_args(argv)
    if own.recipe == "run_clm":
        _, data, args = common.parse_args(
            (run_clm.ModelArguments, run_clm.DataArguments, IVONTrainingArguments), flags
        )
        if data.streaming:
            raise common.RecipeError("`streaming` must be left out: the examples of the exact diagonal are chosen.")
        recipe, title, finished = run_clm, "text", partial(language_model, data, args)
    else:
        glue, args = common.parse_args((run_glue.GlueArguments, IVONTrainingArguments), flags)
        recipe, title, finished = run_glue, glue.task_name, partial(classifier, glue, args)
    if not (Path(args.output_dir) / "results.json").is_file():
        with contextlib.redirect_stdout(sys.stderr):
            recipe.main([*flags, "--eval_num_samples", "0"])
    results = measure(finished(), str(args.output_dir), own)
    write_json(Path(args.output_dir) / "curvature.json", results)
    header = ["layer", "weights", "seen", "rank corr.", "by tensor", "halves", "learnt/exact", "moved"]
    print(common.table([[layer, *row] for layer, row in results["layers"].items()], header))
    metrics = list(results["quality"]["mean"])
    print(common.table([[name, *q.values()] for name, q in results["quality"].items()], [title, *metrics]))
    return results


if __name__ == "__main__":
    common.main_guard(main)
