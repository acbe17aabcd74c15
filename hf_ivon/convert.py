"""Posteriors out of what others saved: Hessians as a model directory, flat Hessians, the reference optimizer's state.

Daheim et al. (arXiv:2310.12808) pass a diagonal Hessian on as a directory written by `save_pretrained`, with the
Hessian in place of the weights. The reference optimizer, ivon-opt, keeps one flat Hessian per parameter group, in the
order of the parameters.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ivon import functional
from hf_ivon.json_files import read_json
from hf_ivon.mean import buffer_keys, match_problems, mean_digest, posterior_keys, unwrap
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig, library_versions, one_or_all
from hf_ivon.renamed import tensors_as_loaded
from hf_ivon.tensor_files import TensorFiles

_SETTINGS = ("ess", "weight_decay", "hess_init")
_SMALLEST = 1e-30  # of `hess_init`, which is the average Hessian where nothing says what it was
_WEIGHT_DECAY = 1e-5  # the paper's for finetuning, where nothing says otherwise


@dataclass
class _Flat:
    """One flat Hessian of several parameters, with what is known of it."""

    hess: Tensor
    num_params: int | None
    settings: dict[str, float]


@dataclass
class _Source:
    """What a source holds: Hessians by the model's names, and what is known of each and of all."""

    hess: dict[str, Tensor]
    settings: dict[str, dict[str, float]]
    estimator: str = "converted"
    steps: int = 0
    betas: tuple[float, float] = (0.0, 0.0)


def convert(
    source: str | os.PathLike[str],
    model: nn.Module,
    *,
    ess: float | None = None,
    weight_decay: float | None = None,
    num_examples: int | None = None,
    num_tokens: int | None = None,
    scale: float = 1.0,
    estimator: str | None = None,
    trust_pickle: bool = False,
) -> Posterior:
    """Make a posterior out of a saved diagonal Hessian.

    Args:
        source: A directory with `model.safetensors` (or `adapter_model.safetensors`) that holds the Hessian under the
            names of the model, or of its file; or a pickle: `optimizer.pt` of ivon-opt, or a flat Hessian over all
            parameters in their order, as a tensor or as `hess` in a mapping with `ess` and `weight_decay`.
        model: The model that holds the mean. Parameters that were not trained should not require gradients.
        ess: Effective sample size λ; by default what the file says, or else the number of tokens or examples.
        weight_decay: Prior precision per example δ; by default what the file says, or else 1e-5.
        num_examples: Number of training examples N.
        num_tokens: Number of label tokens, for losses that average over tokens.
        scale: Factor that makes the Hessian one of the loss per example: 1/N if it is a sum over examples.
        estimator: What made the Hessian, such as "squared-gradient"; by default "ivon-opt" or "converted".
        trust_pickle: Open pickles, of which only tensors and plain values are read.

    Returns:
        The posterior, tensors on the CPU.

    Raises:
        ValueError: If the source is a pickle that is not trusted, cannot be read, does not fit the model, or a setting
            is missing or contradicts it.
    """
    path = Path(source)
    if not 0 < scale < float("inf"):
        raise ValueError(f"`scale` must be positive, got {scale!r}. 1 is a Hessian of the loss per example.")
    params = posterior_keys(model)
    found = _read_directory(path, model) if path.is_dir() else _read_pickle(path, model, trust_pickle)
    hess = {name: h.detach().cpu().float() * scale for name, h in found.hess.items()}
    if unfit := [name for name, h in hess.items() if not torch.isfinite(h).all()]:
        raise ValueError(
            f"The Hessian in {str(path)!r} must be finite, but is not in {_listed(unfit)}. Save it again."
        )
    average = sum(float(h.double().sum()) for h in hess.values()) / sum(h.numel() for h in hess.values())
    size = num_tokens or num_examples
    given = {"ess": ess, "weight_decay": weight_decay, "hess_init": None}
    defaults = {"ess": size, "weight_decay": _WEIGHT_DECAY, "hess_init": max(average, _SMALLEST)}
    settings = {
        key: {n: _setting(key, found.settings[n].get(key), given[key], defaults[key], path) for n in hess}
        for key in _SETTINGS
    }
    delta = settings["weight_decay"]
    if unfit := [name for name, h in hess.items() if not (h + delta[name] > 0).all()]:
        raise ValueError(
            f"The Hessian in {str(path)!r} must be positive with `weight_decay` added, but is not in {_listed(unfit)}."
            f" Give a larger `weight_decay`, or look for what went wrong in training."
        )
    variance = {
        name: functional.posterior_variance(h, ess=settings["ess"][name], weight_decay=delta[name])
        for name, h in hess.items()
    }
    config = PosteriorConfig(
        ess=one_or_all(settings["ess"]),
        weight_decay=one_or_all(delta),
        hess_init=one_or_all(settings["hess_init"]),
        num_examples=num_examples,
        num_tokens=num_tokens,
        steps=found.steps,
        betas=found.betas,
        estimator=estimator or found.estimator,
        mean_digest=mean_digest(params, variance),
        versions=library_versions(),
    )
    return Posterior(variance, config)


def _read_directory(path: Path, model: nn.Module) -> _Source:
    """Read the Hessians in a directory."""
    stem = "adapter_model" if (path / "adapter_config.json").is_file() else "model"
    problems: list[str] = []
    files = TensorFiles(path, stem, problems)
    params = posterior_keys(model)
    hess = {name: files[name] for name, entry in files.entries.items() if entry.dtype.is_floating_point}
    hess = _of_parameters(hess, model)
    if not problems and not hess.keys() <= params.keys():
        renamed, unknown = tensors_as_loaded(path, model, torch.float32)
        if not unknown:
            hess = {name: renamed[name] for name in params if name in renamed} or hess
    if not problems:
        problems = match_problems(hess, params) if hess else ["it holds no tensor"]
    if problems:
        raise ValueError(
            f"The Hessian in {str(path)!r} cannot be used: {'; '.join(problems)}. Name the model it belongs to."
        )
    return _Source(hess, {name: {} for name in hess})


def _of_parameters(hess: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a Hessian without what a model directory holds beside its parameters: buffers, and tied ones again."""
    inner = unwrap(model)
    buffers = {*dict(inner.named_buffers()), *buffer_keys(model)}
    first = {p: name for name, p in inner.named_parameters()}
    found = {name: h for name, h in hess.items() if name not in buffers}
    for name, p in inner.named_parameters(remove_duplicate=False):
        if name in found and first[p] != name:
            h = found.pop(name)
            if not torch.equal(found.setdefault(first[p], h), h):
                raise ValueError(
                    f"The Hessian must have one value for each weight, got different ones for `{first[p]}` and "
                    f"`{name}`, which are one parameter of the model. Save the first alone."
                )
    return found


def _read_pickle(path: Path, model: nn.Module, trust_pickle: bool) -> _Source:
    """Read the state of ivon-opt, or a flat Hessian."""
    value = _load_pickle(path, trust_pickle)
    if not isinstance(value, Mapping) or "param_groups" not in value:
        return _Source(*_by_name([_flat(value, path)], model, path))
    groups = value["param_groups"]
    found = _Source(*_by_name([_optimizer_group(group, path) for group in groups], model, path), "ivon-opt")
    found.betas = (float(groups[0].get("beta1", 0)), float(groups[0].get("beta2", 0)))
    steps = (read_json(path.parent / "trainer_state.json", []) or {}).get("global_step")
    found.steps = steps if isinstance(steps, int) else 0  # the optimizer's own state does not say it
    return found


def _load_pickle(path: Path, trust_pickle: bool) -> Any:
    if not path.is_file():
        raise ValueError(f"The Hessian {str(path)!r} does not exist. Name a directory or a file.")
    if not trust_pickle:
        raise ValueError(
            f"The Hessian must be a directory with safetensors, got {str(path)!r}, a pickle, which can be made to run "
            f"code when it is opened. If you trust who made it, say so by --trust-pickle; of its content only tensors "
            f"and plain values are read."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as err:
        raise ValueError(
            f"The pickle {str(path)!r} cannot be read: it is damaged, or holds more than tensors and plain values "
            f"({str(err).splitlines()[0]}). Save the Hessian again, as safetensors if you can."
        ) from err


def _optimizer_group(group: Mapping[str, Any], path: Path) -> _Flat:
    """Return the flat Hessian of one parameter group of ivon-opt."""
    if not isinstance(group.get("hess"), Tensor):
        raise ValueError(
            f"The optimizer's state {str(path)!r} must be of ivon-opt, got parameter groups without `hess`. "
            f"Checkpoints of this package have their posterior beside them; for others use `hf-ivon curvature`."
        )
    settings = {key: float(group[key]) for key in _SETTINGS if key in group}
    return _Flat(group["hess"], len(group["params"]), settings)


def _flat(value: Any, path: Path) -> _Flat:
    known = value if isinstance(value, Mapping) else {"hess": value}
    if not isinstance(known.get("hess"), Tensor) or known["hess"].ndim != 1:
        names = f" of {', '.join(map(str, list(known)[:5]))}" if known is value else ""
        raise ValueError(
            f"The pickle {str(path)!r} must hold a flat tensor, a mapping with it as `hess`, or the state of "
            f"ivon-opt, got {type(value).__name__}{names}."
        )
    return _Flat(known["hess"], None, {key: float(known[key]) for key in _SETTINGS if key in known})


def _by_name(
    groups: Sequence[_Flat], model: nn.Module, path: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Cut flat Hessians into the parameters that the model's own file holds; also return the settings of each."""
    params = dict(model.named_parameters())
    ways = _fitting(groups, model)
    if len(ways) != 1:
        sizes = ", ".join(f"{group.hess.numel():,}" for group in groups)
        raise ValueError(
            f"The parameter groups in {str(path)!r}, of {sizes} weights, must fit the model's "
            f"{sum(p.numel() for p in params.values()):,} in one way: all in one group, in two as a Trainer makes "
            f"them, or matrices and the rest; got {len(ways)} that fit. In Python, freeze what was not trained before "
            f"`hf_ivon.convert.convert`."
        )
    keys = {p: key for key, p in posterior_keys(model).items()}
    hess, settings = {}, {}
    for group, names in zip(groups, ways[0], strict=True):
        parts = group.hess.split([params[name].numel() for name in names])
        for p, part in zip((params[name] for name in names), parts, strict=True):
            if p in keys:
                hess[keys[p]], settings[keys[p]] = part.reshape(p.shape), group.settings
    return hess, settings


def _fitting(groups: Sequence[_Flat], model: nn.Module) -> list[list[list[str]]]:
    """Return the ways in which the names of the model's parameters make groups of these sizes, each way once."""
    from transformers import Trainer

    params = dict(model.named_parameters())
    trained = [name for name, p in params.items() if p.requires_grad]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it looks at the model only
    matrices = {name for name, p in params.items() if p.ndim >= 2}
    ways = [[list(params)], [trained]]
    ways += [
        [[n for n in trained if n in first], [n for n in trained if n not in first]] for first in (decayed, matrices)
    ]
    sizes = [group.hess.numel() for group in groups]
    counts = [group.num_params for group in groups]
    fitting: list[list[list[str]]] = []
    for way in ways:
        fits = [sum(params[name].numel() for name in names) for names in way] == sizes
        fits = fits and all(c in (None, len(names)) for c, names in zip(counts, way, strict=True))
        if fits and way not in fitting:
            fitting.append(way)
    return fitting


def _setting(key: str, known: float | None, given: float | None, default: float | None, path: Path) -> float:
    """Return a setting that the file knows, or was given, or has a default; it must not be contradicted."""
    if known is not None and given is not None and known != given:
        raise ValueError(f"`{key}` must be what {str(path)!r} says, {known:g}, got {given:g}. Leave it out.")
    value = next((v for v in (known, given, default) if v is not None), None)
    if value is None:
        raise ValueError(f"`{key}` or the number of examples must be given for {str(path)!r}, which does not say it.")
    if not (0 <= value if key == "weight_decay" else 0 < value) or value == float("inf"):
        raise ValueError(f"`{key}` must be positive, got {value!r}. Correct it.")
    return float(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
