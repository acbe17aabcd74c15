"""A posterior's files on the Hub: downloaded alone, uploaded beside the mean."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from hf_ivon.checkpoint import CONFIG_NAME, load_posterior, save_posterior
from hf_ivon.hub.card import CARD_NAME, write_card
from hf_ivon.tensor_files import TensorFiles

if TYPE_CHECKING:
    from hf_ivon.posterior import Posterior

_PATTERNS = ("posterior*.safetensors", "posterior.safetensors.index.json", CONFIG_NAME)
_MEANS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# What the card's snippet depends on.
_DESCRIPTIONS = ("config.json", "adapter_config.json", "tokenizer_config.json")
# What resuming needs and nobody else, and files of the moment; the first two are also what the Trainer leaves behind.
_LEFT_BEHIND = ("_*", "checkpoint-*", ".*", "runs/*", "events.out.*", "optimizer*", "scheduler.pt", "scaler.pt",
                "rng_state*", "pytorch_model_fsdp*", "training_args.bin")  # fmt: skip


def download(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the directory that holds a posterior's files, downloading them if it is a repository.

    Args:
        name: A directory, or a repository's id.
        revision: Branch, tag or commit of the repository.
        subfolder: Where in it the files are.
        token: Access token of the Hub; None is the one that is saved, False is none.
        cache_dir: Where downloads are kept.
        local_files_only: Take what was downloaded before, and ask no server.

    Returns:
        The directory.
    """
    directory = Path(name)
    if not directory.is_dir():
        directory = Path(
            snapshot_download(
                str(name),
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=[f"{subfolder}/{p}" if subfolder else p for p in _PATTERNS],
            )
        )
    return directory / subfolder


def upload(
    posterior: Posterior,
    repo_id: str,
    *,
    commit_message: str = "Upload posterior",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
) -> CommitInfo:
    """Upload a posterior's files and its card in one commit, in which an earlier posterior is replaced as a whole.

    What the repository's card says otherwise is kept.

    Args:
        posterior: What to upload.
        repo_id: The repository; made if it does not exist.
        commit_message: Of the commit.
        private: Whether a new repository is private.
        token: Access token of the Hub; None is the one that is saved.
        revision: Branch to commit to.
        create_pr: Open a pull request instead.
        max_shard_size: Largest file, in bytes or like "5GB".

    Returns:
        The Hub client's `CommitInfo`.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        save_posterior(posterior, directory, max_shard_size=max_shard_size)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        for name in (CARD_NAME, *_DESCRIPTIONS):
            with suppress(EntryNotFoundError):
                api.hf_hub_download(repo_id, name, revision=revision, local_dir=directory)
        write_card(directory, repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=[*_PATTERNS, CARD_NAME],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(_PATTERNS),  # shards of an earlier one would be taken for this one's
        )


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    license: str | None = None,
    commit_message: str = "Upload model and posterior",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a checkpoint, the mean with its posterior and its card, in one commit.

    The README in the directory is written first, see `write_card`. What only resuming needs (optimizer, scheduler,
    other checkpoints) stays behind. Weights of an earlier push are replaced as a whole; other files there are kept. If
    the upload fails, the repository is as it was, and so is the directory: push again.

    Args:
        directory: The checkpoint.
        repo_id: The repository; made if it does not exist.
        license: Of the model, such as "apache-2.0"; None keeps the one that the card has.
        commit_message: Of the commit.
        private: Whether a new repository is private.
        token: Access token of the Hub; None is the one that is saved.
        revision: Branch to commit to.
        create_pr: Open a pull request instead.

    Returns:
        The Hub client's `CommitInfo`.

    Raises:
        ValueError: If the posterior cannot be used, there is no mean, or they do not belong together; nothing is
            uploaded then.
        OSError: If the Hub cannot be reached or refuses.
    """
    load_posterior(directory)
    stems = ("model", "adapter_model")
    if not any(file.is_file() for stem in stems for file in TensorFiles(Path(directory), stem, []).files):
        # The commit would take the mean out of the repository, and nothing would come in its place.
        raise ValueError(
            f"The directory must hold the mean, `model.safetensors` or `adapter_model.safetensors`, got a posterior "
            f"alone in {str(directory)!r}. Copy the model's files there, or upload the posterior beside a mean that "
            f"is on the Hub: `load_posterior({str(directory)!r}).push_to_hub({repo_id!r})`."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    write_card(directory, repo_id, license=license)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=str(directory),
        ignore_patterns=list(_LEFT_BEHIND),
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=[*_PATTERNS, *_MEANS],  # another number of shards would be read beside, or instead of, these
    )
