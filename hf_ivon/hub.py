"""A posterior's files on the Hub: downloaded alone, uploaded beside the mean."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download

from hf_ivon.checkpoint import CONFIG_NAME, save_posterior

if TYPE_CHECKING:
    from hf_ivon.posterior import Posterior

_PATTERNS = ("posterior*.safetensors", "posterior.safetensors.index.json", CONFIG_NAME)


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
                cache_dir=cache_dir,
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
) -> Any:
    """Upload a posterior's files in one commit, in which an earlier one there is replaced as a whole.

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
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(_PATTERNS),  # shards of an earlier one would be taken for this one's
        )
