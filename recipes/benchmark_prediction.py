"""What averaging over a posterior costs: weight samples one after another, and several at once, beside plain passes.

    python recipes/benchmark_prediction.py MODEL --data test.jsonl --output_dir out

In each round as many passes at the mean are timed as there are weight samples, then `posterior_predict`, then
several weight samples at once by `torch.func.vmap`. Medians over the rounds of the seconds (of processor time, where
there is no accelerator) and of each round's ratio to the plain passes are printed, and written into `results.json`.
Small data show what a sample itself costs, as it writes all weights once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hf_ivon import Posterior, posterior_predict
from hf_ivon.data import load_batches, load_checkpoint
from hf_ivon.draws import sample_generator
from hf_ivon.predict import evaluation_mode

try:
    from recipes import common
except ImportError:  # run as a script: this directory is on the path
    import common

Batches = list[dict[str, Tensor]]


def at_once(model: nn.Module, posterior: Posterior, batches: Batches, num_samples: int) -> Tensor:
    """Return probabilities averaged over weight samples that share each pass, (examples, classes), fp64."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    draws = [posterior.sample(mean, generator=sample_generator(0, index)) for index in range(num_samples)]
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in posterior.names()}
    parts = []
    with torch.no_grad(), evaluation_mode(model):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}

            def logits(weights: dict[str, Tensor], inputs: dict[str, Tensor] = inputs) -> Tensor:
                return functional_call(model, weights, (), inputs).logits

            parts.append(vmap(logits)(stacked).double().softmax(-1).mean(0))
    return torch.cat(parts)


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes: of this process's work on a CPU, else by the clock."""
    device = torch.cuda.is_available()
    clock = time.perf_counter if device else time.process_time
    torch.cuda.synchronize() if device else None
    start = clock()
    work()
    torch.cuda.synchronize() if device else None
    return clock() - start


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write `results.json`."""
    parser = argparse.ArgumentParser(description="What averaging over a posterior costs.")
    parser.add_argument("model", help="directory of a classifier with its posterior and tokenizer")
    parser.add_argument("--data", required=True, help="labelled rows")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--at_once", type=int, default=4, help="weight samples that share a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=64, help="tokens at which a text is cut")
    arguments = parser.parse_args(argv)
    if min(arguments.num_samples, arguments.at_once, arguments.rounds) < 1:
        raise common.RecipeError("`--num_samples`, `--at_once` and `--rounds` must be at least 1. Raise them.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_checkpoint(arguments.model)
    model.to(device)
    posterior = Posterior.from_pretrained(arguments.model, model)
    batches = load_batches(arguments.data, model, tokenizer, max_length=arguments.max_length)
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    samples, groups = arguments.num_samples, -(-arguments.num_samples // arguments.at_once)
    works: dict[str, Callable[[], Any]] = {
        "plain passes": lambda: [posterior_predict(model, None, batches, num_samples=0) for _ in range(samples)],
        "weight samples": lambda: posterior_predict(model, posterior, batches, num_samples=samples),
        "several at once": lambda: [at_once(model, posterior, batches, arguments.at_once) for _ in range(groups)],
    }
    for work in works.values():
        work()
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(arguments.rounds)]
    plain = next(iter(works))
    found = {
        name: {
            "seconds": statistics.median(taken[name] for taken in rounds),
            "ratio": statistics.median(taken[name] / taken[plain] for taken in rounds),
        }
        for name in works
    }
    found["several at once"]["ratio"] *= samples / (groups * arguments.at_once)  # of as many samples
    common.write_results(arguments.output_dir, found)
    print(common.table([[name, *row.values()] for name, row in found.items()], ["", "seconds", "to plain"]))
    return found


if __name__ == "__main__":
    common.main_guard(main)
