"""Late interaction as teacher: a vector for each token, and for each of the query's the most similar of the document's.

The score is ColBERT's MaxSim (arXiv 2004.12832), ``sum over query tokens of max over document tokens of their dot
product``. Because it falls apart into texts, a batch's every query can be scored against its every document for the
price of encoding each text once: TCT-ColBERT's teacher (arXiv 2010.11386).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from retrieval_kd.artifacts import file_sha256, fingerprint, read_json
from retrieval_kd.batching import length_sorted_batches, pad
from retrieval_kd.encoders.base import load_tokenizer
from retrieval_kd.encoders.card import Side
from retrieval_kd.encoders.layout import body_folder
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.encoders.torch_encoder import BATCH_TOKENS, quiet_transformers, read_body
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.runs import Scores
from retrieval_kd.scores.store import ScoreSource

LAYOUT = "query and document apart; one vector a token"
# Pairs whose texts are encoded at a time; a text that several of them share is encoded once.
_CHUNK = 1024
# Similarities of tokens in memory at a time.
_SIMILARITIES = 1 << 24
_SETTINGS = "config_sentence_transformers.json"
_MULTI_VECTOR = ("MultiVectorEncoder", "ColBERT")


class TokenEncoder(Protocol):
    """Turns a text into one vector a token."""

    @property
    def parameters(self) -> int:
        """Return the number of weights."""

    def encode(self, texts: Sequence[str], side: Side) -> list[Tensor]:
        """Return float32 ``[tokens, d]`` for each text."""


class LateInteraction:
    """A late-interaction model; scores are raw MaxSim sums, which grow with the query's number of tokens."""

    def __init__(self, name: str, encoder: TokenEncoder, identity: str, max_length: int) -> None:
        """Use :meth:`load`."""
        self.name = name
        self.max_length = max_length
        self.fingerprint = identity
        self._encoder = encoder

    @classmethod
    def load(cls, model: str, max_length: int, query_prefix: str = "", document_prefix: str = "") -> LateInteraction:
        """Read a late-interaction model, or make one of any encoder.

        A folder of sentence-transformers' MultiVectorEncoder (PyLate's and Stanford's ColBERT too) is read by it, with
        its projection, masks, markers, query expansion and lengths. Of any other encoder the states of every token,
        special ones included, are scaled to unit length.

        Args:
            model: A local folder or hub id.
            max_length: Longest text in tokens; of a MultiVectorEncoder, longest document, where its own is not shorter.
            query_prefix: Text put before every query.
            document_prefix: Text put before every document.

        Raises:
            RecipeError: there is no such model, or it has fewer positions than ``max_length``.
            ArtifactError: it cannot be read; names the folder.
        """
        folder = resolve_model(model)
        prefixes = {"query": query_prefix, "document": document_prefix}
        encoder: TokenEncoder
        if _is_multi_vector(folder):
            encoder = _MultiVector(folder, max_length, prefixes)
        else:
            encoder = _TokenStates(body_folder(folder), max_length, prefixes)
        files = {
            str(path.relative_to(folder)): file_sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".json", ".metadata")
        }
        identity = fingerprint(
            {"kind": type(encoder).__name__, "files": files, "max_length": max_length, "prefixes": prefixes}
        )
        return cls(Path(model).name, encoder, identity, max_length)

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return self._encoder.parameters

    @property
    def source(self) -> ScoreSource:
        """Return what a score store's manifest says about this teacher."""
        return ScoreSource(self.name, self.fingerprint, LAYOUT, self.max_length, "maxsim")

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: Callable[[int], None] | None = None) -> Scores:
        """Score (query, document) texts.

        Args:
            pairs: Any number of pairs; they are worked on in chunks.
            on_rows: Called with the number of pairs each chunk finished.

        Returns:
            MaxSim, float32 ``[len(pairs)]``, in the order of ``pairs``; minus infinity for a text without tokens.
        """
        scores = np.empty(len(pairs), dtype=np.float32)
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            queries = self._encoded([query for query, _ in chunk], "query")
            documents = self._encoded([document for _, document in chunk], "document")
            rows: defaultdict[str, list[int]] = defaultdict(list)
            for row, (query, _) in enumerate(chunk):
                rows[query].append(row)
            for query, of_query in rows.items():
                values = maxsim([queries[query]], [documents[chunk[row][1]] for row in of_query])[0]
                scores[start + np.array(of_query)] = values.cpu().numpy()
            if on_rows is not None:
                on_rows(len(chunk))
        return scores

    def matrix(self, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """Return the MaxSim of every query with every document, float32 ``[B, C]``, without gradients."""
        of_query, of_document = self._encoded(queries, "query"), self._encoded(documents, "document")
        return maxsim([of_query[text] for text in queries], [of_document[text] for text in documents])

    def _encoded(self, texts: Sequence[str], side: Side) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, self._encoder.encode(distinct, side), strict=True))


def maxsim(queries: Sequence[Tensor], documents: Sequence[Tensor]) -> Tensor:
    """Return the MaxSim of every query with every document.

    Args:
        queries: One float ``[tokens, d]`` a query.
        documents: One float ``[tokens, d]`` a document.

    Returns:
        float32 ``[len(queries), len(documents)]``; minus infinity for a document without tokens, 0 for a query
        without.
    """
    tokens = torch.cat(list(documents)).float()
    lengths = [len(document) for document in documents]
    of_queries = torch.cat(list(queries)).float()
    rows = max(1, _SIMILARITIES // max(1, len(tokens)))
    best = torch.cat(
        [
            _highest(of_queries[start : start + rows] @ tokens.T, lengths)
            for start in range(0, max(1, len(of_queries)), rows)
        ]
    )
    return torch.stack([part.sum(dim=0) for part in torch.split(best, [len(query) for query in queries])])


def _highest(similarities: Tensor, lengths: list[int]) -> Tensor:
    """Return the largest of each group of columns, ``[rows, groups]``; minus infinity of an empty one."""
    worst = similarities.new_full((len(similarities),), -torch.inf)
    return torch.stack(
        [part.amax(dim=1) if part.shape[1] else worst for part in torch.split(similarities, lengths, 1)], dim=1
    )


class _TokenStates:
    """The token states of any encoder's body, scaled to unit length."""

    def __init__(self, folder: Path, max_length: int, prefixes: dict[str, str]) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._body = read_body(folder).to(self._device).eval()
        positions = getattr(self._body.config, "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise RecipeError(f"teacher: max_length {max_length} is more than the {positions} positions of {folder}")
        self._tokenizer: Tokenizer = load_tokenizer(folder)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._prefixes = prefixes

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return _weights(self._body)

    def encode(self, texts: Sequence[str], side: Side) -> list[Tensor]:
        """Return the states of every token, special ones included."""
        prefix = self._prefixes[side]
        rows = [row.ids for row in self._tokenizer.encode_batch_fast([prefix + text for text in texts])]
        vectors: dict[int, Tensor] = {}
        with torch.inference_mode():
            for positions in length_sorted_batches([len(row) for row in rows], BATCH_TOKENS):
                ids, mask = (torch.from_numpy(array).to(self._device) for array in pad([rows[i] for i in positions]))
                states = self._body(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                states = nn.functional.normalize(states, dim=-1)
                vectors |= {int(i): states[at, : len(rows[i])] for at, i in enumerate(positions)}
        return [vectors[i] for i in range(len(rows))]


class _MultiVector:
    """sentence-transformers' MultiVectorEncoder."""

    def __init__(self, folder: Path, max_length: int, prefixes: dict[str, str]) -> None:
        import sentence_transformers

        try:
            with quiet_transformers():
                self._model: Any = sentence_transformers.MultiVectorEncoder(
                    str(folder), local_files_only=True, model_kwargs={"dtype": torch.float32}
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(f"{folder}: cannot read the late-interaction model ({reason}); save it again") from None
        transformer = self._model[0]
        transformer.document_length = min(transformer.document_length or max_length, max_length)
        self._prefixes = prefixes

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return _weights(self._model)

    def encode(self, texts: Sequence[str], side: Side) -> list[Tensor]:
        """Return the vectors of the tokens that the model scores."""
        encode = self._model.encode_query if side == "query" else self._model.encode_document
        prefix = self._prefixes[side]
        return cast("list[Tensor]", encode([prefix + text for text in texts], show_progress_bar=False))


def _weights(model: nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


def _is_multi_vector(folder: Path) -> bool:
    settings = folder / _SETTINGS
    if settings.is_file() and read_json(settings).get("model_type") in _MULTI_VECTOR:
        return True
    config = folder / "config.json"
    architectures = (read_json(config).get("architectures") or []) if config.is_file() else []
    return any(name == "HF_ColBERT" or name.endswith("ForRetrieval") for name in architectures)
