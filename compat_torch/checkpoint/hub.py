"""Models on the Hugging Face hub: the files a model needs, from the local cache where they are already there."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError

_WEIGHTS = ("model*.safetensors", "*.safetensors", "*.bin")
_BESIDE = ("*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "README*")
_NEVER = ("*/*", "optimizer*", "training_args*", "scheduler*", "rng_state*")


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
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=[*_BESIDE, weights], ignore_patterns=list(_NEVER)
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as err:
        where = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        reason = " ".join(str(err).split())[:300]
        raise CheckpointError(f"the model {where} cannot be fetched from the hub: {reason}") from err
    return Path(folder)
