"""Building an index version from an encoded corpus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from index.documents import document_fields, field_types, write_documents
from index.ids import IDS, write_ids
from index.kinds import resolved, write_ann
from index.manifest import IndexContent
from index.probes import PROBE_COUNT, evenly_spaced
from index.search import make_probes
from index.store import IndexStore
from index.vectors import write_stored
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.matryoshka import truncated
from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.recipes.schema import IndexSpec

_BLOCK_ROWS = 4096


def build_index(
    corpus: EncodedCorpus,
    spec: IndexSpec,
    store: Path,
    query_card: EncoderCard | None = None,
    *,
    queries: EncodedCorpus | None = None,
    collection: Collection | None = None,
    fields: Sequence[str] = (),
) -> Path:
    """Build an index version and make it the store's current one; do nothing if it is there already.

    Args:
        corpus: The documents' vectors.
        spec: How they will be searched.
        store: The store's folder, made if absent.
        query_card: The encoder that will search; checked when given.
        queries: Vectors of queries that nothing was trained on, by that encoder; some become the version's probes.
            Without them documents do, which tests the version as well but says nothing of its recall.
        collection: The documents themselves; needed with ``fields``.
        fields: Names of what is stored with each document: ``title``, ``text``, or keys of its metadata.

    Returns:
        The folder of the version.

    Raises:
        EncoderMismatch: queries would not lie in the documents' space.
        DataError: no documents, a vector that is not finite, a dimension the encoder does not have, a field that no
            document has, or too few documents for the kind; names what.
        ArtifactError: the store cannot be written; what was published stays.
    """
    card = corpus.card
    for other in (query_card, None if queries is None else queries.card):
        if other is not None:
            require_same_space(other, card)
    if card.similarity == "cosine" and not card.normalize:
        raise DataError(
            f"encoder {card.name!r} compares by cosine but does not normalise, and an index compares by "
            "dot product; set normalize in its card and encode again"
        )
    # Frozen document vectors are cut to what a query student was trained for.
    known = sorted({*card.dimensions, *(() if query_card is None else query_card.dimensions)}, reverse=True)
    if spec.dimension and spec.dimension not in known:
        sizes = ", ".join(map(str, known))
        raise DataError(f"index.dimension: encoder {card.name!r} has no {spec.dimension}; it has {sizes}")
    _require_finite(corpus)
    shape = (len(corpus.ids), spec.dimension or card.dimension)
    content = IndexContent(
        requested=spec,
        index=resolved(spec, shape[0]),
        count=shape[0],
        dimension=shape[1],
        largest_norm=0.0,
        document_encoder=card,
        query_encoder="" if query_card is None else query_card.fingerprint,
        encoding_fingerprint=corpus.fingerprint,
        corpus_fingerprint=corpus.texts_fingerprint,
        queries_fingerprint="" if queries is None else queries.fingerprint,
        fields=_field_types(corpus, collection, fields),
    )

    def blocks() -> Iterator[Vectors]:
        return (truncated(block, shape[1], card.normalize) for block in _blocks(corpus.vectors))

    def write(folder: Path) -> IndexContent:
        write_ids(folder / IDS, corpus.ids)
        stored = write_stored(folder, blocks, shape, spec.storage)
        if content.fields:
            assert collection is not None
            documents = ((document.doc_id, document_fields(document)) for document in collection.documents())
            write_documents(folder, documents, content.fields, corpus.row_of)
        write_ann(folder, stored, content.index)
        longest = max(float(np.linalg.norm(block.astype(np.float64), axis=1).max()) for block in stored.blocks())
        finished = replace(content, largest_norm=longest)
        asked = corpus.vectors if queries is None else queries.vectors
        probes = np.ascontiguousarray(asked[evenly_spaced(len(asked), PROBE_COUNT)])
        make_probes(folder, finished, probes).save(folder)
        return finished

    return IndexStore(store).publish(content.fingerprint, write)


def _require_finite(corpus: EncodedCorpus) -> None:
    if not corpus.ids:
        raise DataError("no documents to index; encode a corpus that has some")
    for start, block in zip(itertools.count(0, _BLOCK_ROWS), _blocks(corpus.vectors), strict=False):
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"document {corpus.ids[row]!r}: its vector is not finite; encode the corpus again")


def _field_types(corpus: EncodedCorpus, collection: Collection | None, names: Sequence[str]) -> Mapping[str, str]:
    if not names:
        return {}
    if collection is None or collection.corpus_fingerprint != corpus.texts_fingerprint:
        raise DataError("stored fields: the collection is not the one that was encoded; give that one")
    types = field_types(map(document_fields, collection.documents()), names)
    for name in names:
        if name not in types:
            known = {key for document in collection.documents() for key in document_fields(document)}
            raise DataError(f"--fields: no document of {collection.name} has {name!r}{did_you_mean(name, known)}")
    return types


def _blocks(vectors: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(vectors), _BLOCK_ROWS):
        yield np.ascontiguousarray(vectors[start : start + _BLOCK_ROWS], dtype=np.float32)
