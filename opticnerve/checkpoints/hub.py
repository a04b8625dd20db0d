"""Downloads checkpoints from the Hugging Face hub, with clear errors.

The token is read from the environment by huggingface_hub (``HF_TOKEN``), as are its offline mode
and its cache directory. huggingface_hub is imported on first use only: a local directory never
needs it and never reaches the network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from opticnerve.errors import CheckpointError

METADATA_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*")
"""Everything but weights: configuration, processor, tokenizer, template, weight index."""


def download(
    repo_id: str, revision: str | None, download_dir: str | None, files: Sequence[str]
) -> Path:
    """The local snapshot directory, with at least the files of the repository that match the
    patterns ``files``. Raises CheckpointError if the download fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, cache_dir=download_dir, allow_patterns=list(files)
            )
        )
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a directory nor a hub id (owner/name); "
            "give the checkpoint's directory or its id on the hub"
        ) from error
    except Exception as error:  # httpx, hub and OS errors have no common base.
        raise CheckpointError(_explain(repo_id, revision, error)) from error


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}; give a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id} is neither a directory here nor a repository on the hub; check the path, "
            "or set HF_TOKEN if the repository is private"
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            f"{repo_id} is no directory here, and the hub cannot be reached{at}; "
            "check the path or the network, or give the directory of a copy"
        )
    return f"{repo_id}{at} could not be downloaded ({type(error).__name__}); try again"


def commit_of(snapshot: Path) -> str | None:
    """The commit of a directory in the hub's cache layout (``.../snapshots/<commit>``), else
    None."""
    name = snapshot.name
    is_commit = len(name) == 40 and all(char in "0123456789abcdef" for char in name)
    return name if is_commit and snapshot.parent.name == "snapshots" else None


def looks_like_hub_id(model: str) -> bool:
    """Whether ``model`` can name a repository: ``owner/name``, not a path. A bare name cannot: it
    is more often a mistyped directory, for which the hub need not be asked."""
    parts = model.split("/")
    return (
        len(parts) == 2
        and all(parts)
        and not model.startswith((".", "~", os.sep))
        and not model.endswith((".safetensors", ".gguf", ".bin", ".json"))
    )
