"""The posterior's files: `posterior.safetensors` (or shards with an index) and `posterior_config.json`.

They stand beside the mean, whose file stays what Transformers, PEFT or vLLM expect. Everything is written to temporary
files and renamed; everything is checked on reading; no pickle is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_ivon.posterior import Posterior, match_problems, mean_digest, posterior_keys
from hf_ivon.posterior_config import PosteriorConfig, config_problems

POSTERIOR_NAME = "posterior.safetensors"
POSTERIOR_INDEX_NAME = "posterior.safetensors.index.json"
CONFIG_NAME = "posterior_config.json"
_MEAN_PATTERNS = ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".state")
_PATTERN = "posterior{suffix}.safetensors"


class PosteriorFormatError(ValueError):
    """A posterior's files cannot be read, or do not belong together; the message names all problems."""


def posterior_files(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the posterior's files in a directory: configuration, tensors, index; empty if there are none.

    Args:
        directory: A checkpoint directory.

    Returns:
        Existing files, sorted by name.
    """
    directory = Path(directory)
    shards = [f for f in directory.glob("posterior-*-of-*.safetensors") if f.is_file()]
    single = [directory / name for name in (CONFIG_NAME, POSTERIOR_INDEX_NAME, POSTERIOR_NAME)]
    return sorted(shards + [f for f in single if f.is_file()])


def save_posterior(
    posterior: Posterior, directory: str | os.PathLike[str], max_shard_size: int | str = "5GB"
) -> list[Path]:
    """Write a posterior into a directory, beside the mean; an earlier one there is replaced as a whole.

    Args:
        posterior: What to write.
        directory: Where to; made if it does not exist.
        max_shard_size: Largest file, in bytes or like "5GB"; more tensors go into shards with an index.

    Returns:
        The files written.

    Raises:
        ValueError: If a variance is not positive or not finite; nothing is written then.
    """
    problems = [p for name in posterior.names() for p in _content_problems(name, posterior.variance[name])]
    if problems:
        raise ValueError(
            f"The posterior must have positive, finite variances, but {'; '.join(problems)}. Check training."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: posterior.variance[name].detach().float().contiguous().cpu() for name in posterior.names()}
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    # Every file says which mean it belongs to: after a crash between two renames, a mixed set is recognized.
    metadata = {"format": "pt", "mean_digest": posterior.config.mean_digest}
    pending: dict[Path, Path] = {}
    try:
        for file, keys in split.filename_to_tensors.items():
            pending[directory / file] = directory / f".{file}.tmp"
            save_file({n: tensors[n] for n in keys}, pending[directory / file], metadata=metadata)
        if split.is_sharded:
            index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
            pending[directory / POSTERIOR_INDEX_NAME] = _write_json(directory / f".{POSTERIOR_INDEX_NAME}.tmp", index)
        pending[directory / CONFIG_NAME] = _write_json(directory / f".{CONFIG_NAME}.tmp", posterior.config.to_dict())
        earlier = set(posterior_files(directory))
        for target, written in pending.items():
            os.replace(written, target)
    finally:
        for written in pending.values():
            written.unlink(missing_ok=True)
    for stale in earlier - set(pending):
        stale.unlink()
    return sorted(pending)


def load_posterior(directory: str | os.PathLike[str], model: nn.Module | None = None) -> Posterior:
    """Read a posterior and check all that its files say.

    Args:
        directory: A directory with the posterior's files.
        model: The model that holds the mean; names, shapes and the digest are checked against it. Without it they are
            checked against `model.safetensors` or `adapter_model.safetensors` in the directory, where there is one.

    Returns:
        The posterior, tensors on the CPU.

    Raises:
        PosteriorFormatError: If anything is wrong; one message names all problems, and nothing is loaded.
    """
    directory = Path(directory)
    problems: list[str] = []
    config = _read_config(directory, problems)
    variance = _read_tensors(directory, config, problems)
    if config is not None and variance and not problems:
        by_name = [k for k in ("ess", "weight_decay", "hess_init") if isinstance(config[k], dict)]
        missing = [k for k in by_name if not variance.keys() <= config[k].keys()]
        problems += [f"`{k}` in {CONFIG_NAME} is not given for every tensor" for k in missing]
        try:
            mean = _mean(directory, variance, model)
            if mean is not None:
                problems += match_problems(variance, mean) or _digest_problems(config["mean_digest"], variance, mean)
        except (SafetensorError, OSError) as err:
            problems.append(f"the mean beside it cannot be read ({err})")
    if problems or config is None:
        raise PosteriorFormatError(
            f"The posterior in {str(directory)!r} cannot be used: {'; '.join(problems)}. "
            f"Save it again from training, or download the complete checkpoint."
        )
    return Posterior(variance, PosteriorConfig.from_dict(config))


def _write_json(path: Path, value: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return path


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return None
    except (OSError, ValueError) as err:
        problems.append(f"{path.name} is not readable JSON ({err})")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a JSON object")
        return None
    return value


def _read_config(directory: Path, problems: list[str]) -> dict[str, Any] | None:
    config = _read_json(directory / CONFIG_NAME, problems)
    if config is None:
        return None
    wrong = config_problems(config)
    problems += [f"{CONFIG_NAME}: {problem}" for problem in wrong]
    return None if wrong else config


def _read_tensors(directory: Path, config: Mapping[str, Any] | None, problems: list[str]) -> dict[str, Tensor]:
    """Read the tensors of all shards, tensor by tensor, noting every problem."""
    files: dict[str, set[str] | None] = {POSTERIOR_NAME: None}
    if (directory / POSTERIOR_INDEX_NAME).exists():
        index = _read_json(directory / POSTERIOR_INDEX_NAME, problems) or {}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(f) for f in weight_map.values()):
            problems.append(f"{POSTERIOR_INDEX_NAME} has no valid `weight_map`")
            return {}
        files = {f: {k for k, g in weight_map.items() if g == f} for f in sorted(set(weight_map.values()))}
    variance: dict[str, Tensor] = {}
    for file, expected in files.items():
        if not (directory / file).is_file():
            pickles = [
                p.name for p in directory.glob("posterior*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".state")
            ]
            hint = f" ({', '.join(pickles)} is a pickle, which is never read)" if pickles else ""
            problems.append(f"{file} is missing{hint}")
            continue
        try:
            variance.update(_read_file(directory / file, expected, config, problems))
        except (SafetensorError, OSError, ValueError) as err:
            problems.append(f"{file} is truncated or not a safetensors file ({err})")
    return variance


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value and value.endswith(".safetensors")


def _read_file(
    path: Path, expected: set[str] | None, config: Mapping[str, Any] | None, problems: list[str]
) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        digest = (file.metadata() or {}).get("mean_digest")
        if config is not None and digest != config["mean_digest"]:
            problems.append(f"{path.name} and {CONFIG_NAME} are from different saves (their `mean_digest` differs)")
        names = set(file.keys())
        if expected is not None and names != expected:
            wrong = sorted(names ^ expected)
            problems.append(f"{path.name} and the index disagree about {', '.join(wrong[:3])}")
        if not names:
            problems.append(f"{path.name} holds no tensor")
        for name in sorted(names):
            tensor = file.get_tensor(name)
            problems += _content_problems(name, tensor)
            yield name, tensor


def _content_problems(name: str, tensor: Tensor) -> list[str]:
    if tensor.dtype != torch.float32:
        return [f"`{name}` is {str(tensor.dtype).removeprefix('torch.')}, not float32"]
    if not torch.isfinite(tensor).all():
        return [f"`{name}` holds NaN or inf"]
    if not (tensor > 0).all():
        return [f"`{name}` holds variances that are not positive"]
    return []


class _FileTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read when it is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        files = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in files for name in file.keys()}

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _mean(directory: Path, variance: Mapping[str, Tensor], model: nn.Module | None) -> Mapping[str, Tensor] | None:
    """Return the mean that the posterior claims to belong to, if it is at hand."""
    if model is not None:
        return posterior_keys(model)
    for pattern in _MEAN_PATTERNS:
        paths = sorted(directory.glob(pattern))
        if paths:
            tensors = _FileTensors(paths)
            # The model's own file may name tensors otherwise than its parameters; then only a loaded model can tell.
            return tensors if set(variance) <= set(tensors) else None
    return None


def _digest_problems(expected: str, variance: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> list[str]:
    if mean_digest(mean, variance) == expected:
        return []
    return [
        "the mean beside it is not the one it belongs to (its digest differs: the weights were changed or replaced)"
    ]
