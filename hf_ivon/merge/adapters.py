"""LoRA adapters: whether they share a space, and merged as products where they do not."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_ivon.json_files import write_json
from hf_ivon.merge import methods
from hf_ivon.merge.files import Checkpoint

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MODES = ("concat", "svd")
# What must agree for A and B of two adapters to mean the same thing.
_SPACE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
# With any of these, a module's difference is not `scale * B @ A`, or it is not added to one weight of the base.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "target_parameters",
    "layer_replication",
)
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # of A and B, which leave the base as it is
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_FACTORS = tuple(end for pair in _PAIRS for end in pair)


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


def space_problems(models: Sequence[Checkpoint], mode: str | None, into_base: bool = False) -> list[str]:
    """Return why adapters cannot be merged, one string a problem.

    Args:
        models: The adapters.
        mode: "concat" or "svd" to merge products, None to merge A with A and B with B.
        into_base: Whether the result is folded into the base model.
    """
    problems = []
    configs = [m.json(CONFIG) for m in models]
    bases = [c.get("base_model_name_or_path") for c in configs]
    if len(set(bases)) > 1:
        problems.append(f"the adapters are of different base models: {', '.join(map(str, dict.fromkeys(bases)))}")
    own = [(c.get("trainable_token_indices"), _changed_by(c)) for c in configs]
    if any(values != own[0] for values in own):
        problems.append(
            "the adapters differ in `trainable_token_indices`, or in a start that changes the base's weights"
        )
    if mode is not None or into_base:
        use, option = ("merged as products", "--adapters") if mode is not None else ("folded", "--into-base")
        problems += [p for m in models for p in _plain_problems(m, use, option)]
    if mode is not None:
        return problems + _saved_problems(models)
    for key in _SPACE:
        values = [c.get(key) or None for c in configs]
        if any(v != values[0] for v in values):
            listed = ", ".join(f"{v} in {m.name}" for m, v in zip(models, values, strict=True))
            problems.append(
                f"the adapters differ in `{key}` ({listed}): pass --adapters concat to merge their products exactly, "
                f"or --adapters svd to keep the largest rank"
            )
    return problems


def _plain_problems(model: Checkpoint, use: str, option: str) -> list[str]:
    """Return why an adapter is more than products that are added to its base's weights, and whole tensors."""
    config = model.json(CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        return [f"{model.name} is {kind}, and only LoRA can be {use}: merge without {option}"]
    problems = [
        f"{model.name} has `{key}`, and only plain LoRA can be {use}: merge without {option}"
        for key in _VARIANTS
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append(f"{model.name} trains biases, which products leave out: merge without {option}")
    if start := _changed_by(config):
        problems.append(
            f"{model.name} was started with {start!r}, which changes the base's weights too, and only plain LoRA can "
            f"be {use}: PEFT's `path_initial_model_for_weight_conversion` saves such an adapter as plain LoRA"
        )
    entries, found = model.tensors.entries, 0
    saved = config.get("modules_to_save") or []
    if saved and not any(f".{module}." in name for module in saved for name in entries):
        problems.append(
            f"{model.name} has no weights of its `modules_to_save`, {', '.join(saved)}: copy them from the adapter "
            f"that it was made of, which PEFT's conversion does not, or take the names out of its {CONFIG}"
        )
    for name in entries:
        for first, second in _PAIRS:
            if name.endswith(first):
                found += 1
                other = entries.get(name.removesuffix(first) + second)
                if other is None or other.shape[1] != entries[name].shape[0]:  # as those of grouped convolutions
                    problems.append(f"{model.name} has no matrix that `{name}` is multiplied by, and cannot be {use}")
    return problems if found else [*problems, f"{model.name} has no LoRA weights, and cannot be {use}"]


def _changed_by(config: Mapping[str, Any]) -> str | None:
    """Return the start of A and B that changed the weights of the base, such as "pissa"; None if it left them."""
    start = config.get("init_lora_weights")
    return None if start in _STARTS else str(start)


def _saved_problems(models: Sequence[Checkpoint]) -> list[str]:
    """Name what is low-rank in one adapter and saved as a whole by another: PEFT would drop the product."""
    modules = {module for m in models if m.json(CONFIG).get("peft_type") == "LORA" for module in products(m)}
    saved = {name for m in models for name in m.json(CONFIG).get("modules_to_save") or ()}
    clash = [m for m in sorted(modules) if any(re.match(rf"(.*\.)?{name}($|\.)", m) for name in saved)]
    return [f"`{module}` is low-rank in one adapter, and saved as a whole by another" for module in clash[:1]]


def whole_tensors(names: Collection[str]) -> list[str]:
    """Return which tensors of an adapter are no factors of products, such as those of a classifier."""
    return [name for name in names if not name.endswith(_FACTORS)]


def wide_dtype(models: Sequence[Checkpoint]) -> torch.dtype:
    """Return what to compute with: fp32, or fp64 if that is what one of the models holds."""
    dtypes = {entry.dtype for m in models for entry in m.tensors.entries.values()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


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
    models: Sequence[Checkpoint],
    weights: Sequence[float],
    mode: str,
    method: str,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    kept: Mapping[str, Checkpoint] | None = None,
    dropped: Collection[str] = (),
) -> dict[str, int]:
    """Write an adapter whose products are the weighted sums of the adapters' products.

    Args:
        models: Adapters of one base model, of any ranks and targets.
        weights: One number per model.
        mode: "concat" keeps the sums exactly, with ranks that add up; "svd" their best approximation of the largest
            rank of the adapters.
        method: "average" divides by the weights' sum; "task-arithmetic" does not.
        directory: Where to.
        dtype: Of the result; that of the first adapter with the tensor by default.
        kept: Whole tensors that are taken from one adapter.
        dropped: Whole tensors that are left out.

    Returns:
        The ranks of the result by module, as the report has them.

    Raises:
        ValueError: If a tensor holds NaN or inf, or integers differ.
    """
    factors = [w / sum(weights) for w in weights] if method == "average" else list(weights)
    wide = wide_dtype(models)
    of_model = [products(m) for m in models]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted({name for found in of_model for name in found}):
        having = zip(models, of_model, factors, strict=True)
        parts = [(model, found[module], factor) for model, found, factor in having if module in found]
        first, product, _ = parts[0]
        downs = [_finite(m, p.names[0]).to(wide) for m, p, _ in parts]
        ups = [_finite(m, p.names[1]).to(wide) * (f * p.scale) for m, p, f in parts]
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        if mode == "svd":
            down, up = _truncate(down, up, max(d.shape[0] for d in downs))
        ranks[module] = down.shape[0]
        for name, factor in zip(product.names, (down, up), strict=True):
            tensors[name] = factor.to(dtype or first.tensors.entries[name].dtype).contiguous()
    for name, source in (kept or {}).items():
        tensor = _finite(source, name)
        tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    for name in whole_tensors(models[0].tensors.entries):
        if name not in tensors and name not in dropped:
            tensors[name] = _average(models, name, factors, wide, dtype)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"The merged tensor `{name}` is too large for {tensor.dtype}. Choose another --dtype.")
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    _write_config(models, ranks, directory)
    return ranks


def _finite(model: Checkpoint, name: str) -> Tensor:
    tensor = model.tensors[name]
    if not tensor.isfinite().all():
        raise ValueError(f"The tensor `{name}` of {model.name} holds NaN or inf. Check that model.")
    return tensor


def _average(
    models: Sequence[Checkpoint], name: str, weights: Sequence[float], wide: torch.dtype, dtype: torch.dtype | None
) -> Tensor:
    parts = [_finite(m, name) for m in models]
    if parts[0].is_floating_point():
        summed = sum(w * p.to(wide) for w, p in zip(weights, parts, strict=True))
        return (summed / sum(weights)).to(dtype or parts[0].dtype)  # type: ignore[union-attr]
    return methods.equal(name, parts)


def _truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of ``up @ down`` of a rank, without forming the product."""
    left, small = torch.linalg.qr(up.flatten(1))  # those of convolutions have more dimensions
    right, other = torch.linalg.qr(down.flatten(1).T)
    u, s, v = torch.linalg.svd(small @ other.T)
    root = s[:rank].sqrt()
    down_shape, up_shape = (-1, *down.shape[1:]), (len(up), -1, *up.shape[2:])
    return (root[:, None] * (v[:rank] @ right.T)).reshape(down_shape), ((left @ u[:, :rank]) * root).reshape(up_shape)


def _write_config(models: Sequence[Checkpoint], ranks: Mapping[str, int], directory: Path) -> None:
    """Write a configuration by which PEFT finds every product, and each has the scale 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Patterns match the ends of names too, unless they say where a name begins.
    pattern = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    saved = {module for m in models for module in m.json(CONFIG).get("modules_to_save") or ()}
    config = {
        **models[0].json(CONFIG),
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "init_lora_weights": True,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "eva_config")),
    }
    write_json(directory / CONFIG, config)


def drop_saved(directory: Path, dropped: Collection[str]) -> None:
    """Have an adapter's configuration not ask for modules whose tensors were left out: PEFT would not load it."""
    path = directory / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    saved = config.get("modules_to_save") or []
    if any(f".{module}." in name for module in saved for name in dropped):
        names = Checkpoint.open(str(directory), []).tensors.entries
        left = [m for m in saved if any(f".{m}." in n for n in names) and not any(f".{m}." in n for n in dropped)]
        # For these tasks PEFT adds the head to the modules by itself.
        config |= {"task_type": None} if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else {}
        write_json(path, {**config, "modules_to_save": left or None})


def _of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return a module's entry in a pattern of PEFT, whose keys are ends of module names, or expressions for them."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)
