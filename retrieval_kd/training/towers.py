"""Who turns a batch's ids into vectors: towers that train, towers that are frozen, and a teacher that trains along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from retrieval_kd.batching import pad
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import TextTokenizer
from retrieval_kd.encoders.card import Side
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.teachers.pairs import PairTokenizer, one_score
from retrieval_kd.training.passes import Passes, Positions, Work

TextsById = Callable[[Sequence[str]], Mapping[str, str]]
_Row = npt.NDArray[np.int32]
# Tokens of texts kept in memory: 64 MiB of them. Texts beyond are tokenised whenever they are met.
_KEPT_TOKENS = 1 << 24


class TokenRows:
    """Token rows by text id; each text is tokenised once, as long as the rows fit a budget."""

    def __init__(self, tokenizer: TextTokenizer, side: Side, texts: TextsById, kept_tokens: int = _KEPT_TOKENS) -> None:
        """Keep no row yet; ``texts`` looks up the contents of ids."""
        self._tokenizer = tokenizer
        self._side = side
        self._texts = texts
        self._room = kept_tokens
        self._kept: dict[str, _Row] = {}

    def __call__(self, ids: Sequence[str]) -> list[_Row]:
        """Return each text's row, int32."""
        new = [text_id for text_id in dict.fromkeys(ids) if text_id not in self._kept]
        rows: dict[str, _Row] = {}
        if new:
            texts = self._texts(new)
            tokens = self._tokenizer([texts[text_id] for text_id in new], self._side)
            rows = {text_id: np.array(row, dtype=np.int32) for text_id, row in zip(new, tokens, strict=True)}
        for text_id, row in rows.items():
            if len(row) <= self._room:
                self._room -= len(row)
                self._kept[text_id] = row
        return [rows[text_id] if text_id in rows else self._kept[text_id] for text_id in ids]


@dataclass(frozen=True)
class Encoded:
    """What a tower makes of a batch's texts.

    Attributes:
        vectors: float ``[n, d]``.
        layers: float ``[n, K, width]``, pooled states of the layers asked for; None where none were or can be.
    """

    vectors: Tensor
    layers: Tensor | None = None


class Tower:
    """An encoder and the texts of one side."""

    def __init__(self, encoder: TorchEncoder, rows: TokenRows, frozen: bool = False) -> None:
        """Encode ``rows`` with ``encoder``, without gradients and dropout where it is ``frozen``."""
        self.encoder = encoder
        self.frozen = frozen
        self._rows = rows

    def encode(self, ids: Sequence[str], passes: Passes, layers: Sequence[int] = ()) -> Encoded:
        """Return the vectors of texts, and of each of them the pooled states of ``layers``, 0-based."""
        rows = self._rows(ids)

        def forward(positions: Positions) -> Tensor:
            ids, mask = (torch.from_numpy(a).to(self.encoder.device) for a in pad([rows[i] for i in positions]))
            if not layers:
                vectors: Tensor = self.encoder(ids, mask)
                return vectors
            vectors, states = self.encoder.with_layers(ids, mask, layers)
            return torch.cat([vectors, states.flatten(1)], dim=1)

        output = passes.run(Work([len(row) for row in rows], forward), gradients=not self.frozen)
        if not layers:
            return Encoded(output)
        dimension = self.encoder.card.dimension
        return Encoded(output[:, :dimension], output[:, dimension:].reshape(len(rows), len(layers), -1))

    def frozen_copy(self) -> Tower:
        """Return a tower that goes on giving what this one gives now."""
        return Tower(copy.deepcopy(self.encoder).eval(), self._rows, frozen=True)


class DocumentTower(Protocol):
    """Gives the vectors of a batch's documents, and what they should be."""

    @property
    def encoder(self) -> nn.Module | None:
        """Return the module that trains on the documents; None where they are frozen."""

    def encode(self, doc_ids: Sequence[str], passes: Passes, layers: Sequence[int] = ()) -> Encoded:
        """Return the documents' vectors, ``[len(doc_ids), d]``, and of live ones the pooled states of ``layers``."""

    def targets(self, doc_ids: Sequence[str]) -> Tensor | None:
        """Return the large encoder's vectors of the documents; None where they are the tower's own."""

    def frozen_copy(self) -> DocumentTower:
        """Return a tower that goes on giving the vectors this one gives now."""


class FrozenDocuments:
    """Asymmetric mode: the large encoder's vectors, looked up and never trained."""

    encoder: None = None

    def __init__(self, corpus: EncodedCorpus, device: torch.device) -> None:
        """Read vectors from the encoded corpus as they are asked for."""
        self._corpus = corpus
        self._device = device

    def encode(self, doc_ids: Sequence[str], passes: Passes, layers: Sequence[int] = ()) -> Encoded:
        """Return the vectors without gradients; what is looked up has no layers."""
        return Encoded(self.vectors(doc_ids))

    def vectors(self, doc_ids: Sequence[str]) -> Tensor:
        """Return float32 ``[len(doc_ids), d]``."""
        rows = [self._corpus.row_of[doc_id] for doc_id in doc_ids]
        return torch.from_numpy(np.asarray(self._corpus.vectors[rows], dtype=np.float32)).to(self._device)

    def targets(self, doc_ids: Sequence[str]) -> Tensor | None:
        """Return None: frozen vectors are where they should be."""
        return None

    def frozen_copy(self) -> FrozenDocuments:
        """Return the same documents."""
        return self


class LiveDocuments:
    """Symmetric mode: the documents go through an encoder that trains, the student itself or a tower beside it."""

    def __init__(
        self, encoder: TorchEncoder, collection: Collection, corpus: EncodedCorpus, device: torch.device
    ) -> None:
        """Look texts up by id, encode them with ``encoder``, and aim at the vectors of ``corpus``."""
        self._tower = Tower(encoder, TokenRows(encoder.tokenizer, "document", collection.contents))
        self._targets = FrozenDocuments(corpus, device)

    @property
    def encoder(self) -> TorchEncoder:
        """Return the encoder of the documents."""
        return self._tower.encoder

    def encode(self, doc_ids: Sequence[str], passes: Passes, layers: Sequence[int] = ()) -> Encoded:
        """Return ``[len(doc_ids), d]`` with gradients."""
        return self._tower.encode(doc_ids, passes, layers)

    def targets(self, doc_ids: Sequence[str]) -> Tensor | None:
        """Return the large encoder's vectors of the same documents."""
        return self._targets.vectors(doc_ids)

    def frozen_copy(self) -> LiveDocuments:
        """Return the documents as the encoder sees them now, without gradients."""
        frozen = copy.copy(self)
        frozen._tower = self._tower.frozen_copy()
        return frozen


class LayerTeacher:
    """A teacher of layers: an encoder whose intermediate states rank candidates too (LEAD, arXiv 2212.05225).

    Attributes:
        layers: For each of the student's layers, in order, the teacher's layer that it is matched with, 0-based.
        queries: The teacher's view of the queries.
        documents: The teacher's view of the documents.
    """

    def __init__(
        self, encoder: TorchEncoder, layers: Sequence[int], texts: Mapping[str, str], collection: Collection
    ) -> None:
        """Freeze ``encoder``; ``texts`` are the queries by id."""
        encoder.eval()
        self._encoder = encoder
        self.layers = tuple(layers)
        self.queries = Tower(encoder, TokenRows(encoder.tokenizer, "query", lambda ids: texts), frozen=True)
        self.documents = Tower(encoder, TokenRows(encoder.tokenizer, "document", collection.contents), frozen=True)

    def to(self, device: torch.device) -> None:
        """Move the teacher to the device of training."""
        self._encoder.to(device)


class JointReranker:
    """A cross-encoder that scores each batch as it is and learns along with the student (RocketQAv2).

    Attributes:
        module: The sequence classifier; trained in place, checkpointed with the student.
        learning_rate: Its peak rate; the schedule gives the shape.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PairTokenizer,
        queries: Mapping[str, str],
        collection: Collection,
        learning_rate: float,
    ) -> None:
        """Score texts of ``queries`` and ``collection``, looked up by id."""
        self.module = module
        self.learning_rate = learning_rate
        self._tokenizer = tokenizer
        self._queries = queries
        self._collection = collection

    def scores(self, pairs: Sequence[tuple[str, str]], passes: Passes) -> Tensor:
        """Return raw logits of (query id, document id) pairs, float ``[len(pairs)]``, with gradients."""
        contents = self._collection.contents(list(dict.fromkeys(doc_id for _, doc_id in pairs)))
        rows = self._tokenizer([(self._queries[query_id], contents[doc_id]) for query_id, doc_id in pairs])
        device = next(self.module.parameters()).device

        def forward(positions: Positions) -> Tensor:
            return one_score(self.module(**self._tokenizer.batch([rows[i] for i in positions], device)).logits)

        return passes.run(Work([len(row.ids) for row in rows], forward))
