"""Models on the Hugging Face hub: the files a model needs, from the local cache where they are already there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_WEIGHTS = ("model*.safetensors", "*.safetensors", "*.bin")
_BESIDE = ("*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "README*")
_NEVER = ("*/*", "optimizer*", "training_args*", "scheduler*", "rng_state*")


def locate(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The file or folder `path`, or the folder of the hub's repository "owner/name", fetched.

    Args:
        path: what is there on this machine is taken, whatever the hub has; a name that starts with ".", "/" or "~" is
            never a repository.
        revision: branch, tag or commit of a repository.

    Raises:
        FileNotFoundError: it is neither. ValueError: a revision of something that is not a repository.
        ImportError, CheckpointError: as `fetch`.
    """
    name = os.fspath(path)
    if os.path.exists(name):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for repositories on the hub; {name} is a local path")
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return fetch(name, revision)
    raise FileNotFoundError(f"there is no file or folder {name}, and it is not a repository 'owner/name' on the hub")


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """Download a model's configuration, weights, tokenizer and licence; nothing else, and no code.

    Weights are the safetensors files; only a repository without any gives its pytorch_model.bin. What the cache of
    huggingface_hub has is not downloaded again, and with HF_HUB_OFFLINE=1 nothing is.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit; None is the default branch.

    Returns:
        the folder in the cache, which `open_folder` opens.

    Raises:
        ImportError: huggingface_hub is not installed.
        CheckpointError: there is no such model or revision, no access, or it is not in the cache and the hub
            cannot be reached; or the repository has no weights.
    """
    for weights in _WEIGHTS:
        folder = _download(repo_id, revision, weights)
        if any(folder.glob(weights)):
            return folder
    raise CheckpointError(f"the model {repo_id!r} has no weights on the hub ({', '.join(_WEIGHTS)})")


def _download(repo_id: str, revision: str | None, weights: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as err:
        raise ImportError("models on the hub need huggingface_hub: pip install 'spyx-torch[hub]'") from err
    errors_of_http: Any = HfHubHTTPError.__bases__  # those of its HTTP library, whichever that is
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=[*_BESIDE, weights], ignore_patterns=list(_NEVER)
        )
    except (*errors_of_http, HFValidationError, OSError, ValueError) as err:
        where = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        reason = " ".join(str(err).split())[:300]
        raise CheckpointError(f"the model {where} cannot be fetched from the hub: {reason}") from err
    return Path(folder)
