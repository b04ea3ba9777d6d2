"""A smaller vocabulary: the tokens a collection uses, and enough others that any text still has tokens.

Half of a small BERT is its word embeddings (11.7 of MiniLM's 22.6 million weights), and most rows belong to
tokens that a collection never sees. Leaving them out changes nothing for a text whose tokens are all kept:
WordPiece takes the longest match, Unigram the most probable split, and both find the same one among fewer.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn

from retrieval_kd.encoders.base import TOKENIZER
from retrieval_kd.encoders.static import StaticBody
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.schema import VocabularySpec

Ids = npt.NDArray[np.int64]
_SETTINGS = "tokenizer_config.json"
_WINDOW = 1024


def token_counts(tokenizer_json: bytes, texts: Iterable[str]) -> Ids:
    """Count each token over whole texts, special tokens left out; memory holds one window of texts.

    Returns:
        int64 ``[V]``.
    """
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    stream = iter(texts)
    while window := list(itertools.islice(stream, _WINDOW)):
        rows = tokenizer.encode_batch_fast(window, add_special_tokens=False)
        ids = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])
        counts += np.bincount(ids, minlength=len(counts))
    return counts


def kept_tokens(tokenizer_json: bytes, counts: Ids, spec: VocabularySpec) -> Ids:
    """Choose the tokens to keep.

    Special tokens and single characters always stay, so that every text still has tokens, and unknown
    characters are the same ones as before.

    Args:
        tokenizer_json: The ``tokenizer.json`` to prune.
        counts: int64 ``[V]``, from :func:`token_counts`.
        spec: Whether to keep all that were seen, or the most frequent of them.

    Returns:
        int64 ids in the old vocabulary, increasing; a token's place is its new id.

    Raises:
        RecipeError: nothing was seen, or the tokenizer is of a kind whose pieces depend on each other.
    """
    raw = json.loads(tokenizer_json)
    if not counts.any():
        raise RecipeError("student.vocabulary: no text to choose tokens by; give a collection or keep all")
    seen = np.flatnonzero(counts)
    if spec.limit:
        # A stable sort, so that of equally frequent tokens the ones with the smaller ids stay.
        seen = seen[np.argsort(-counts[seen], kind="stable")][: spec.limit]
    always = _special(raw) | _characters(raw["model"])
    return np.asarray(sorted(always | set(seen.tolist())), dtype=np.int64)


def prune(encoder: TorchEncoder, kept: Ids) -> TorchEncoder:
    """Return an encoder of the kept tokens alone.

    Args:
        encoder: The encoder; it is not changed.
        kept: Increasing ids, from :func:`kept_tokens`.
    """
    new_id = {int(old): new for new, old in enumerate(kept)}
    body = copy.deepcopy(encoder.body)
    rows = torch.from_numpy(kept)
    if isinstance(body, StaticBody):
        body = StaticBody(body.embeddings.detach()[rows], body.weights.detach()[rows])
    else:
        _prune_body(body, rows, new_id)
    files = _prune_files(encoder.tokenizer_files, new_id)
    pruned = TorchEncoder(body, copy.deepcopy(encoder.projection), files, encoder.card)
    pruned.refresh_card()
    return pruned


def _prune_body(body: nn.Module, rows: torch.Tensor, new_id: Mapping[int, int]) -> None:
    old = cast("Any", body).get_input_embeddings()
    weight = old.weight.detach()[rows]
    table = nn.Embedding(len(weight), weight.shape[1], padding_idx=old.padding_idx, _weight=weight)
    cast("Any", body).set_input_embeddings(table)
    config = cast("Any", body.config)
    config.vocab_size = len(rows)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"):
        if getattr(config, name, None) in new_id:
            setattr(config, name, new_id[getattr(config, name)])


def _prune_files(files: Mapping[str, bytes], new_id: Mapping[int, int]) -> dict[str, bytes]:
    raw = json.loads(files[TOKENIZER])
    model = raw["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [model["vocab"][old] for old in new_id]
        model["unk_id"] = new_id.get(model.get("unk_id"))
    else:
        model["vocab"] = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    for token in raw["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber(raw.get("post_processor"), new_id)
    pruned = {**files, TOKENIZER: json.dumps(raw, ensure_ascii=False).encode()}
    if _SETTINGS in files:
        settings = json.loads(files[_SETTINGS])
        added = settings.get("added_tokens_decoder")
        if added:
            settings["added_tokens_decoder"] = {str(new_id[int(old)]): token for old, token in added.items()}
        pruned[_SETTINGS] = json.dumps(settings, ensure_ascii=False).encode()
    return pruned


def _renumber(node: Any, new_id: Mapping[int, int]) -> None:
    """Change the ids of special tokens in a post-processor, which may hold others."""
    for special, place in _special_ids(node):
        special[place] = new_id[special[place]]


def _special_ids(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Yield each list in a post-processor that holds a special token's id, and the place of the id in it."""
    if not isinstance(node, dict):
        return
    for special in node.get("special_tokens", {}).values():
        yield from ((special["ids"], place) for place in range(len(special["ids"])))
    # BertProcessing and RobertaProcessing have pairs of a token and its id.
    yield from ((node[name], 1) for name in ("cls", "sep") if name in node)
    for inner in node.get("processors", ()):
        yield from _special_ids(inner)


def _special(raw: Mapping[str, Any]) -> set[int]:
    """Return the ids of tokens that no text has to contain for them to be needed."""
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    named = [tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>", raw["model"].get("unk_token") or "")]
    # RoBERTa counts positions from the padding's id, so ids up to it keep their places.
    padding = max((token for token in named[:2] if token is not None), default=-1)
    return {
        *(token["id"] for token in raw["added_tokens"]),
        *(holder[place] for holder, place in _special_ids(raw.get("post_processor"))),
        *(token for token in (*named, raw["model"].get("unk_id")) if token is not None),
        *range(padding + 1),
    }


def _characters(model: Mapping[str, Any]) -> set[int]:
    """Return the ids of single characters, at the start of a word and within one."""
    match model["type"]:
        case "WordPiece":
            prefix = model["continuing_subword_prefix"]
            return {old for token, old in model["vocab"].items() if len(token.removeprefix(prefix)) == 1}
        case "Unigram":
            return {old for old, (piece, _) in enumerate(model["vocab"]) if len(piece.removeprefix("▁")) <= 1}
        case "WordLevel":
            return set()
    raise RecipeError(f"student.vocabulary: a {model['type']} tokenizer makes its tokens out of each other; keep all")
