"""LoRA adapters: whether they share a space, and merged as products where they do not."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_ivon.merge.files import Checkpoint

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MODES = ("concat", "svd")
# What must agree for A and B of two adapters to mean the same thing.
_SPACE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True)
class Product:
    """One module's low-rank difference, ``scale * B @ A``.

    Attributes:
        module: The module's name in the base model.
        names: The tensors' names in the adapter, of A and of B.
        scale: What their product is multiplied by.
    """

    module: str
    names: tuple[str, str]
    scale: float


def space_problems(models: Sequence[Checkpoint], mode: str | None) -> list[str]:
    """Return why adapters cannot be merged, one string a problem.

    Args:
        models: The adapters.
        mode: "concat" or "svd" to merge products, None to merge A with A and B with B.
    """
    problems = []
    configs = [m.json(CONFIG) for m in models]
    first = configs[0]
    bases = [c.get("base_model_name_or_path") for c in configs]
    if len(set(bases)) > 1:
        problems.append(f"the adapters are of different base models: {', '.join(map(str, dict.fromkeys(bases)))}")
    for model, config in zip(models, configs, strict=True):
        kind, dora = config.get("peft_type"), config.get("use_dora")
        if (mode is not None or kind != first.get("peft_type")) and (kind != "LORA" or dora):
            problems.append(f"{model.name} is {'DoRA' if dora else kind}, and only LoRA's products can be merged")
        if mode is not None and config.get("bias", "none") != "none":
            problems.append(f"{model.name} trains biases, which products leave out: merge without --adapters")
    if mode is not None:
        return problems
    for key in _SPACE:
        values = [c.get(key) or None for c in configs]
        if any(v != values[0] for v in values):
            listed = ", ".join(f"{v} in {m.name}" for m, v in zip(models, values, strict=True))
            problems.append(
                f"the adapters differ in `{key}` ({listed}): pass --adapters concat to merge their products exactly, "
                f"or --adapters svd to keep the largest rank"
            )
    return problems


def products(adapter: Checkpoint) -> dict[str, Product]:
    """Return the low-rank differences of an adapter by module."""
    config, found = adapter.json(CONFIG), {}
    for name in adapter.tensors:
        for first, second in _PAIRS:
            if name.endswith(first):
                module = name.removesuffix(first).removeprefix(PREFIX)
                rank = adapter.tensors.entries[name].shape[0]
                alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
                scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
                found[module] = Product(module, (name, name.removesuffix(first) + second), scale)
    return found


def merge_products(
    models: Sequence[Checkpoint], weights: Sequence[float], mode: str, method: str, directory: Path
) -> dict[str, int]:
    """Write an adapter whose products are the weighted sums of the adapters' products.

    Args:
        models: Adapters of one base model, of any ranks and targets.
        weights: One number per model.
        mode: "concat" keeps the sums exactly, with ranks that add up; "svd" their best approximation of the largest
            rank of the adapters.
        method: "average" divides by the weights' sum; "task-arithmetic" does not.
        directory: Where to.

    Returns:
        The ranks of the result by module, as the report has them.
    """
    factors = [w / sum(weights) for w in weights] if method == "average" else list(weights)
    of_model = [products(m) for m in models]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted({name for found in of_model for name in found}):
        downs, ups, names = [], [], ("", "")
        for model, found, factor in zip(models, of_model, factors, strict=True):
            if module in found:
                names = found[module].names
                down, up = (model.tensors[name].float() for name in names)
                downs.append(down)
                ups.append(up * (factor * found[module].scale))
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        if mode == "svd":
            down, up = _truncate(down, up, max(d.shape[0] for d in downs))
        ranks[module] = down.shape[0]
        tensors[names[0]], tensors[names[1]] = down.contiguous(), up.contiguous()
    for name, parts in _whole_tensors(models, tensors):
        total = sum(f for f, p in zip(factors, parts, strict=True) if p is not None)
        merged = sum(f * p.float() for f, p in zip(factors, parts, strict=True) if p is not None)
        tensors[name] = (merged / total).to(next(p for p in parts if p is not None).dtype)  # type: ignore[union-attr]
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    _write_config(models, ranks, directory)
    return ranks


def _truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of ``up @ down`` of a rank, without forming the product."""
    left, small = torch.linalg.qr(up)
    right, other = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(small @ other.T)
    root = s[:rank].sqrt()
    return root[:, None] * (v[:rank] @ right.T), (left @ u[:, :rank]) * root


def _whole_tensors(models: Sequence[Checkpoint], done: Collection[str]) -> Iterator[tuple[str, list[Tensor | None]]]:
    """Yield what adapters hold beside products, such as a classifier: by model, None where one lacks it.

    `done` names what is merged already.
    """
    low_rank = {name for m in models for p in products(m).values() for name in p.names} | set(done)
    for name in sorted({n for m in models for n in m.tensors} - low_rank):
        yield name, [m.tensors[name] if name in m.tensors else None for m in models]


def _write_config(models: Sequence[Checkpoint], ranks: Mapping[str, int], directory: Path) -> None:
    """Write a configuration by which every product has the scale 1."""
    configs = [m.json(CONFIG) for m in models]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {module: r for module, r in ranks.items() if r != rank}
    targets = [c.get("target_modules") for c in configs]
    alike = all(t == targets[0] for t in targets)
    config = {
        **configs[0],
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets[0] if alike else sorted(ranks),
        "init_lora_weights": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return a module's entry in a pattern of PEFT, whose keys are ends of module names, or expressions for them."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)
