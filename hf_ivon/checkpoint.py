"""The posterior's files: `posterior.safetensors` (or shards with an index) and `posterior_config.json`.

They stand beside the mean, whose file stays what Transformers, PEFT or vLLM expect. Everything is written to temporary
files and renamed; everything is checked on reading; no pickle is read.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_ivon import distributed
from hf_ivon.json_files import read_json, to_text
from hf_ivon.mean import match_problems, mean_digest, posterior_keys
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig, config_problems
from hf_ivon.tensor_files import Entry, TensorFiles, headers

logger = logging.getLogger(__name__)

POSTERIOR_NAME = "posterior.safetensors"
POSTERIOR_INDEX_NAME = "posterior.safetensors.index.json"
CONFIG_NAME = "posterior_config.json"
_PATTERN = "posterior{suffix}.safetensors"


class PosteriorFormatError(ValueError):
    """A posterior's files cannot be read, or do not belong together; the message names all problems."""


class Variances(TensorFiles):
    """A posterior's variances in its files: each is read when it is asked for, and checked when it is first read.

    Nothing that was read is kept. The files must stay as they were when they were opened: a posterior that is half of
    one save and half of another would be wrong in a way that nothing shows.

    Args:
        directory: A directory with the posterior's files.
        problems: Where to say what is wrong with them.
    """

    def __init__(self, directory: Path, problems: list[str]) -> None:
        super().__init__(directory, "posterior", problems)
        self._directory = directory
        self._versions = {path: _version(path) for path in {entry.path for entry in self.entries.values()}}
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(name)
        if problems := self._value_problems(name, tensor):
            raise PosteriorFormatError(_unusable(self._directory, problems))
        return tensor

    def value_problems(self) -> list[str]:
        """Read all tensors, one at a time, and return what is wrong with their values."""
        return [problem for name in self.entries for problem in self._value_problems(name, self._read(name))]

    def _value_problems(self, name: str, tensor: Tensor) -> list[str]:
        problems = [] if name in self._checked else variance_problems(name, tensor)
        if not problems:
            self._checked.add(name)
        return problems

    def _read(self, name: str) -> Tensor:
        path = self.entries[name].path
        try:
            if _version(path) == self._versions[path]:
                return super().__getitem__(name)
        except (SafetensorError, OSError) as err:  # a disk that fails, or a file that is gone; the headers were read
            raise PosteriorFormatError(
                f"The posterior in {str(self._directory)!r} cannot be read: {err}. Copy it again."
            ) from err
        raise PosteriorFormatError(
            f"The posterior in {str(self._directory)!r} must stay as it was opened, but {path.name} was written again "
            f"since. Load it again."
        )


def _version(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _unusable(directory: Path, problems: list[str]) -> str:
    return (
        f"The posterior in {str(directory)!r} cannot be used: {'; '.join(problems)}. "
        f"Save it again from training, or download the complete checkpoint."
    )


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
        ValueError: If there is no variance, or one is not positive or not finite, or the posterior is a part
            that was made without its mean; nothing is written then.
    """
    if posterior.is_part:
        raise ValueError(
            "The posterior must say which mean it belongs to, but it is a part made without a mean. Save the whole "
            "posterior, or pass the model that holds the mean to `restrict`."
        )
    tensors = {name: posterior.variance[name].detach().float().contiguous().cpu() for name in posterior.names()}
    tensors = _apart(tensors)
    problems = [problem for name, tensor in tensors.items() for problem in variance_problems(name, tensor)]
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
    texts = {CONFIG_NAME: to_text(posterior.config.to_dict())}
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
        texts[POSTERIOR_INDEX_NAME] = to_text(index)
    pending = {directory / file: directory / f".{file}.tmp" for file in [*split.filename_to_tensors, *texts]}
    try:
        for file, keys in split.filename_to_tensors.items():
            save_file({n: tensors[n] for n in keys}, pending[directory / file], metadata=metadata)
        for file, text in texts.items():
            pending[directory / file].write_text(text, encoding="utf-8")
        earlier = set(posterior_files(directory))
        for target, written in pending.items():
            os.replace(written, target)
    finally:
        for written in pending.values():
            written.unlink(missing_ok=True)
    for stale in earlier - set(pending):
        stale.unlink()
    return sorted(pending)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no storage with others, as files need them; copies only of those that do."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {n: t.clone() if users[t.untyped_storage().data_ptr()] > 1 else t for n, t in tensors.items()}


def load_posterior(
    directory: str | os.PathLike[str], model: nn.Module | None = None, *, check_values: bool = True
) -> Posterior:
    """Open a posterior and check all that its files say; its tensors are read when they are used, and not kept.

    Args:
        directory: A directory with the posterior's files, which must stay as they are while the posterior is in use.
        model: The model that holds the mean; names, shapes and the digest are checked against it. Without it they are
            checked against `model.safetensors` or `adapter_model.safetensors` in the directory, where there is one.
            Loaded in another dtype than it was trained in, it is compared with these files.
        check_values: Read all files once, a tensor at a time, to check the variances and the digest of the mean in the
            directory. If False only configurations and headers are read, and the variances of a tensor are checked
            when it is first used; the digest is then checked against `model` alone.

    Returns:
        The posterior, tensors on the CPU.

    Raises:
        PosteriorFormatError: If anything is wrong; one message names all problems, and nothing is loaded.
    """
    directory = Path(directory)
    problems: list[str] = []
    config, files = open_posterior(directory, problems)
    # The digest is over all tensors: with a file missing it would only repeat that in worse words.
    digest = None if config is None or problems else config.mean_digest
    if check_values:
        problems += files.value_problems()
    elif model is None:
        digest = None
    problems += _mean_problems(directory, files.entries, digest, model)
    if problems or config is None:
        raise PosteriorFormatError(_unusable(directory, problems))
    return Posterior(files, config)


def open_posterior(directory: Path, problems: list[str]) -> tuple[PosteriorConfig | None, Variances]:
    """Read a posterior's configuration and its files' headers, but no tensor.

    Args:
        directory: A directory with the posterior's files.
        problems: Where to say what is wrong with them.

    Returns:
        The configuration, None if it is not valid, and the variances.
    """
    values = read_json(directory / CONFIG_NAME, problems)
    wrong = [] if values is None else config_problems(values)
    problems += [f"{CONFIG_NAME}: {problem}" for problem in wrong]
    config = None if values is None or wrong else PosteriorConfig.from_dict(values)
    files = Variances(directory, problems)
    for file, metadata in files.metadata.items():
        if config is not None and metadata.get("mean_digest") != config.mean_digest:
            problems.append(f"{file} and {CONFIG_NAME} are from different saves (their `mean_digest` differs)")
        if not any(entry.path.name == file for entry in files.entries.values()):
            problems.append(f"{file} holds no tensor")
    for name, entry in files.entries.items():
        if entry.dtype != torch.float32:
            problems.append(f"`{name}` is {str(entry.dtype).removeprefix('torch.')}, not float32")
    if config is not None and files:
        by_name = {k: getattr(config, k) for k in ("ess", "weight_decay", "hess_init")}
        missing = [k for k, v in by_name.items() if isinstance(v, dict) and not files.keys() <= v.keys()]
        problems += [f"`{k}` in {CONFIG_NAME} is not given for every tensor" for k in missing]
    return config, files


def variance_problems(name: str, tensor: Tensor) -> list[str]:
    """Return what is wrong with the variances of one tensor, or with some of its rows."""
    if not tensor.numel():
        return []
    smallest, largest = torch.aminmax(tensor)  # one pass; both are NaN if one value is
    if 0 < float(smallest) and float(largest) < math.inf:
        return []
    if not torch.isfinite(tensor).all():
        return [f"`{name}` holds NaN or inf"]
    return [f"`{name}` holds variances that are not positive"]


def _mean_problems(
    directory: Path, variance: Mapping[str, Entry], digest: str | None, model: nn.Module | None
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
            return match_problems(shared, headers(mean))
        problems = match_problems(variance, headers(mean))
        if problems or digest is None or mean_digest(mean, variance) == digest:
            return problems
        if model is None or not _is_cast(mean, _mean_beside(directory, variance, []), variance, digest):
            problems.append(
                "the mean beside it is not the one it belongs to (its digest differs: the weights were changed, "
                "replaced, or loaded in another dtype)"
            )
    except (SafetensorError, OSError) as err:
        problems.append(f"the mean beside it cannot be read: {err}")
    return problems


def _is_cast(
    mean: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None, names: Iterable[str], digest: str
) -> bool:
    """Tell whether the mean of a model is the one that was saved beside the posterior, only in other dtypes."""
    if saved is None or not saved.keys() >= set(names) or mean_digest(saved, names) != digest:
        return False
    loaded = ((saved[name], distributed.full(mean[name]).cpu()) for name in names)
    return all(torch.equal(was.to(tensor.dtype), tensor) for was, tensor in loaded)


def _mean_beside(directory: Path, variance: Mapping[str, Entry], problems: list[str]) -> Mapping[str, Tensor] | None:
    """Return the tensors of the model or adapter in the directory that shares most names; None if there is none."""
    means = []
    for stem in ("adapter_model", "model"):
        wrong: list[str] = []
        mean = TensorFiles(directory, stem, wrong)
        if any(path.is_file() for path in mean.files):
            means.append(mean)
            problems += [f"the mean beside it cannot be read: {problem}" for problem in wrong]
    return max(means, key=lambda mean: len(variance.keys() & mean.keys()), default=None)
