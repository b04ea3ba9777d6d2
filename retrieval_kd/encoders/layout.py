"""The sentence-transformers folder: which modules make a model, read and written without importing it.

The library takes seconds to import and offers modules we do not have, so its small JSON files are read
directly: Transformer and Pooling (mean or cls), or StaticEmbedding; optionally Dense without activation,
optionally Normalize.
A folder written here opens with ``SentenceTransformer(folder)`` and gives the same vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrieval_kd.artifacts import read_json, write_json
from retrieval_kd.encoders.card import EncoderCard, Pooling, Side
from retrieval_kd.errors import ArtifactError

MODULES = "modules.json"
PROJECTION = "2_Dense"
_SETTINGS = "config_sentence_transformers.json"
_MODULE_TYPES = {
    "StaticEmbedding": "sentence_transformers.models.StaticEmbedding",
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.models.Pooling",
    "Dense": "sentence_transformers.models.Dense",
    "Normalize": "sentence_transformers.models.Normalize",
}
_ROUTER = "sentence_transformers.models.Router"
SIDES: tuple[Side, Side] = ("query", "document")
_SUPPORTED = "Transformer, Pooling or StaticEmbedding, optionally Dense, optionally Normalize"
_SIMILARITIES: Mapping[str, Literal["dot", "cosine"]] = {"cosine": "cosine", "dot": "dot", "dot_product": "dot"}


@dataclass(frozen=True)
class Layout:
    """What a model's folder says about the way from token states to a vector.

    Attributes:
        body: Folder of the transformer or token table, and of its tokenizer.
        static: Whether it is a token table.
        pooling: How token states become one vector.
        projection: Folder of the linear map after pooling, or None.
        normalize: Whether vectors get unit length. A model whose similarity is the cosine does even if
            it has no Normalize module, because everything here compares by dot products.
        similarity: How the model's vectors are compared.
    """

    body: Path
    static: bool
    pooling: Pooling
    projection: Path | None
    normalize: bool
    similarity: Literal["dot", "cosine"]


def body_folder(folder: Path) -> Path:
    """Return where the transformer of a sentence-transformers or plain transformers model lies."""
    return read_layout(folder).body if (folder / MODULES).is_file() else folder


def read_layout(folder: Path) -> Layout:
    """Read the modules of a sentence-transformers model.

    Raises:
        ArtifactError: not such a folder, or it holds a module, pooling, activation or similarity that
            is not supported; names the file.
    """
    path = folder / MODULES
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {MODULES}; save the model with sentence-transformers")
    modules = _modules(path)
    kinds = list(modules)
    static = kinds[:1] == ["StaticEmbedding"]
    start = ["StaticEmbedding"] if static else ["Transformer", "Pooling"]
    if kinds != [*start, *(kind for kind in ("Dense", "Normalize") if kind in modules)]:
        raise ArtifactError(f"{path}: modules {', '.join(kinds)}; supported: {_SUPPORTED}, in this order")
    body = folder / modules[kinds[0]]
    _refuse_lower_casing(body / "sentence_bert_config.json")
    similarity = _similarity(folder / _SETTINGS)
    return Layout(
        body=body,
        static=static,
        pooling="mean" if static else _pooling(folder / modules["Pooling"] / "config.json"),
        projection=_projection(folder / modules["Dense"]) if "Dense" in modules else None,
        normalize="Normalize" in modules or similarity == "cosine",
        similarity=similarity,
    )


def write_layout(
    folder: Path, card: EncoderCard, width: int, static: bool, projected: bool, body_options: Mapping[str, Any]
) -> None:
    """Write the JSON files that let sentence-transformers open the folder.

    Args:
        folder: The model's folder; transformer or token table and tokenizer lie in it directly.
        card: Pooling, normalisation, prefixes and maximum length.
        width: Width of the token states.
        static: Whether the body is a token table, whose tokenizer cuts and whose pooling is built in.
        projected: Whether a linear map from ``width`` to ``card.dimension`` follows the pooling.
        body_options: Keyword arguments the transformer's class is to be built with.
    """
    paths = {"StaticEmbedding": ""} if static else _write_transformer(folder, card, width, body_options)
    if projected:
        paths["Dense"] = PROJECTION
        write_json(
            folder / PROJECTION / "config.json",
            {
                "in_features": width,
                "out_features": card.dimension,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
    if card.normalize:
        paths["Normalize"] = "3_Normalize"
        (folder / "3_Normalize").mkdir(exist_ok=True)
    _write_settings(folder, card.query_prefix, card.document_prefix, card.similarity)
    write_json(
        folder / MODULES,
        [
            {"idx": i, "name": str(i), "path": path, "type": _MODULE_TYPES[kind]}
            for i, (kind, path) in enumerate(paths.items())
        ],
    )


def write_router(folder: Path, query_prefix: str, document_prefix: str, similarity: str) -> None:
    """Join two finished model folders, ``query`` and ``document``, into one model.

    It is the layout of ``Router.for_query_document``, whose ``encode_query`` and ``encode_document`` choose the
    tower; each stays a model of its own.

    Args:
        folder: Holds the two.
        query_prefix: Text put before every query.
        document_prefix: Text put before every document.
        similarity: How vectors are compared.
    """
    types: dict[str, str] = {}
    structure: dict[str, list[str]] = {}
    for side in SIDES:
        structure[side] = []
        for kind, path in _modules(folder / side / MODULES).items():
            module = f"{side}/{path}" if path else side
            types[module] = _MODULE_TYPES[kind]
            structure[side].append(module)
    write_json(
        folder / "router_config.json",
        {
            "types": types,
            "structure": structure,
            "parameters": {"default_route": "document", "allow_empty_key": True, "route_mappings": {}},
        },
    )
    _write_settings(folder, query_prefix, document_prefix, similarity)
    write_json(folder / MODULES, [{"idx": 0, "name": "0", "path": "", "type": _ROUTER}])


def _write_settings(folder: Path, query_prefix: str, document_prefix: str, similarity: str) -> None:
    write_json(
        folder / _SETTINGS,
        {
            "prompts": {"query": query_prefix, "document": document_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": similarity,
        },
    )


def _write_transformer(folder: Path, card: EncoderCard, width: int, options: Mapping[str, Any]) -> dict[str, str]:
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": card.max_length, "do_lower_case": False, "model_args": dict(options)},
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": card.pooling == "cls",
            "pooling_mode_mean_tokens": card.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )
    return {"Transformer": "", "Pooling": "1_Pooling"}


def _modules(path: Path) -> dict[str, str]:
    """Return kind to sub-folder in the order of the file."""
    try:
        entries = [(str(entry["type"]).rsplit(".", 1)[-1], str(entry["path"])) for entry in read_json(path)]
    except (KeyError, TypeError):
        raise ArtifactError(f"{path}: not a list of modules; save the model with sentence-transformers") from None
    modules = dict(entries)
    unknown = [kind for kind in modules if kind not in _MODULE_TYPES]
    if unknown or len(modules) != len(entries):
        kinds = ", ".join(kind for kind, _ in entries)
        raise ArtifactError(f"{path}: modules {kinds}; supported: {_SUPPORTED}, each once")
    return modules


def _pooling(path: Path) -> Pooling:
    raw = _object(path)
    mode = raw.get("pooling_mode")
    if mode is None:
        active = [key for key, on in raw.items() if key.startswith("pooling_mode_") and on is True]
        mode = active[0] if len(active) == 1 else active
    match mode:
        case "mean" | "pooling_mode_mean_tokens" | ["mean"]:
            return "mean"
        case "cls" | "pooling_mode_cls_token" | ["cls"]:
            return "cls"
    raise ArtifactError(f"{path}: pooling {mode!r}; supported: mean, cls")


def _projection(folder: Path) -> Path:
    path = folder / "config.json"
    activation = str(_object(path).get("activation_function"))
    if activation.rsplit(".", 1)[-1] != "Identity":
        raise ArtifactError(f"{path}: activation {activation}; only a Dense module with Identity is supported")
    return folder


def _similarity(path: Path) -> Literal["dot", "cosine"]:
    name = (_object(path).get("similarity_fn_name") if path.is_file() else None) or "cosine"
    if name not in _SIMILARITIES:
        raise ArtifactError(f"{path}: similarity {name!r}; supported: {', '.join(_SIMILARITIES)}")
    return _SIMILARITIES[name]


def _refuse_lower_casing(path: Path) -> None:
    if path.is_file() and _object(path).get("do_lower_case"):
        raise ArtifactError(f"{path}: do_lower_case is on; put the lower casing into the tokenizer's normalizer")


def _object(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path}: not a JSON object; save the model with sentence-transformers")
    return raw
