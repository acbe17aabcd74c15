"""The posterior's files: `posterior.safetensors` (or shards with an index) and `posterior_config.json`.

They stand beside the mean, whose file stays what Transformers, PEFT or vLLM expect. Everything is written to temporary
files and renamed; everything is checked on reading; no pickle is read.
"""

from __future__ import annotations

import json
import logging
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

logger = logging.getLogger(__name__)

POSTERIOR_NAME = "posterior.safetensors"
POSTERIOR_INDEX_NAME = "posterior.safetensors.index.json"
CONFIG_NAME = "posterior_config.json"
_MEAN_NAMES = ("adapter_model.safetensors", "model.safetensors")
_MEAN_INDEX_NAME = "model.safetensors.index.json"
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
        ValueError: If there is no variance, or one is not positive or not finite; nothing is written then.
    """
    tensors = {name: posterior.variance[name].detach().float().contiguous().cpu() for name in posterior.names()}
    problems = [problem for name, tensor in tensors.items() for problem in _content_problems(name, tensor)]
    if not tensors:
        problems.append("it holds no tensor")
    if problems:
        raise ValueError(
            f"The posterior must have positive, finite variances, but {'; '.join(problems)}. Check training."
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
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
    # The digest is over all tensors: with a file missing it would only repeat that in worse words.
    digest = None if config is None or problems else config["mean_digest"]
    problems += [p for name, tensor in variance.items() for p in _content_problems(name, tensor)]
    if config is not None and variance:
        by_name = [k for k in ("ess", "weight_decay", "hess_init") if isinstance(config[k], dict)]
        missing = [k for k in by_name if not variance.keys() <= config[k].keys()]
        problems += [f"`{k}` in {CONFIG_NAME} is not given for every tensor" for k in missing]
    problems += _mean_problems(directory, variance, digest, model)
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
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(_is_file_name(f) for f in weight_map.values())
        ):
            problems.append(f"{POSTERIOR_INDEX_NAME} has no valid `weight_map`")
            return {}
        files = {f: {k for k, g in weight_map.items() if g == f} for f in sorted(set(weight_map.values()))}
    variance: dict[str, Tensor] = {}
    for file, expected in files.items():
        if not (directory / file).is_file():
            pickles = sorted(p.name for p in directory.glob("posterior*") if p.suffix in _PICKLE_SUFFIXES)
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
            yield name, file.get_tensor(name)


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


def _mean_problems(
    directory: Path, variance: Mapping[str, Tensor], digest: str | None, model: nn.Module | None
) -> list[str]:
    """Compare a posterior with the mean it should belong to, if that is at hand; without `digest` names and shapes."""
    problems: list[str] = []
    try:
        if model is not None:
            mean: Mapping[str, Tensor] | None = posterior_keys(model)
        else:
            mean = _mean_beside(directory, variance, problems)
        if mean is None or not variance or problems:
            return problems
        shared = {name: variance[name] for name in variance.keys() & mean.keys()}
        if model is None and len(shared) < len(variance):
            # Some models are saved with tensors renamed or fused; then only a loaded model can tell.
            logger.warning(
                "The posterior in %r is not checked against the model beside it, whose file lacks %d of its names. "
                "Pass `model` to check it.",
                str(directory),
                len(variance) - len(shared),
            )
            return match_problems(shared, mean)
        problems = match_problems(variance, mean)
        if not problems and digest is not None and mean_digest(mean, variance) != digest:
            problems.append(
                "the mean beside it is not the one it belongs to (its digest differs: the weights were changed, "
                "replaced, or loaded in another dtype)"
            )
    except (SafetensorError, OSError) as err:
        problems.append(f"the mean beside it cannot be read ({err})")
    return problems


def _mean_beside(directory: Path, variance: Mapping[str, Tensor], problems: list[str]) -> Mapping[str, Tensor] | None:
    """Return the tensors of the model or adapter in the directory that shares most names; None if there is none."""
    sources = [[directory / name] for name in _MEAN_NAMES if (directory / name).is_file()]
    if (directory / _MEAN_INDEX_NAME).is_file():
        weight_map = (_read_json(directory / _MEAN_INDEX_NAME, problems) or {}).get("weight_map")
        files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        shards = [directory / file for file in sorted(filter(_is_file_name, files))]
        present = [path for path in shards if path.is_file()]
        if present and len(present) < len(shards):
            lost = next(path.name for path in shards if path not in present)
            problems.append(f"the mean beside it is incomplete: {lost} is missing")
        elif present:
            sources.append(present)
    means = [_FileTensors(paths) for paths in sources]
    return max(means, key=lambda mean: len(variance.keys() & mean.keys()), default=None)
