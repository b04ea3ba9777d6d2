"""Building an index version from an encoded corpus."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from index.changes import Changes
from index.documents import field_types, finite_fields, write_documents
from index.ids import IDS, write_ids
from index.kinds import ANN, resolved, write_ann
from index.manifest import IndexContent, IndexManifest, check_files
from index.merge import NO_UPDATE, MergedCorpus
from index.probes import PROBE_COUNT, PROBES, evenly_spaced
from index.search import Opened, make_probes, passes_self_test
from index.store import IndexStore, hold
from index.tune import EXACT_BELOW, Considered, choose, decide, exact, sampled, tune
from index.updates import FOLDED, START, UpdateLog
from index.vectors import BLOCK_ROWS, StoredVectors, write_stored
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard, require_same_space
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.matryoshka import truncated
from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.pages import forget_pages
from retrieval_kd.recipes.schema import IndexKind, IndexSpec


def build_index(
    corpus: EncodedCorpus,
    spec: IndexSpec,
    store: Path,
    query_card: EncoderCard | None = None,
    *,
    queries: EncodedCorpus | None = None,
    collection: Collection | None = None,
    fields: Sequence[str] = (),
    discard_updates: bool = False,
) -> Path:
    """Build an index version and make it the store's current one; do nothing if it is there already and works here.

    What was upserted or deleted in the store since its first build is folded in, and goes before what the corpus has.

    Args:
        corpus: The documents' vectors.
        spec: How they will be searched.
        store: The store's folder, made if absent.
        query_card: The encoder that will search; checked and recorded when given.
        queries: Vectors of queries that nothing was trained on, by that encoder. The search effort is tuned to them,
            ``auto`` chooses by them, and some become the version's probes. Without them documents are its probes,
            which test the version as well but say nothing of its recall.
        collection: The documents themselves; needed with ``fields``.
        fields: Names of what is stored with each document: ``title``, ``text``, or keys of its metadata.
        discard_updates: Leave the store's updates out, because the corpus has them already.

    Returns:
        The folder of the version.

    Raises:
        EncoderMismatch: queries would not lie in the documents' space.
        DataError: no documents, a vector or field that is not finite, a dimension the encoder does not have, a field
            that no document has, too few documents for the kind, or updates by another encoder; names what.
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
    changes = Changes.of(store)
    update = NO_UPDATE if discard_updates else changes.since_first(card)
    merged = MergedCorpus(corpus, update)
    if not merged.ids:
        raise DataError(f"{store}: the updates delete every document; delete fewer, or discard the updates")
    asker = query_card if queries is None else queries.card
    shape = (len(merged.ids), spec.dimension or card.dimension)
    encoding, texts = merged.fingerprints()
    content = IndexContent(
        requested=spec,
        index=spec,
        count=shape[0],
        dimension=shape[1],
        largest_norm=0.0,
        document_encoder=card,
        query_encoder="" if asker is None else asker.fingerprint,
        encoding_fingerprint=encoding,
        corpus_fingerprint=texts,
        queries_fingerprint="" if queries is None else queries.fingerprint,
        fields=_field_types(corpus, merged, collection, fields),
        query_card=asker,
    )

    def blocks() -> Iterator[Vectors]:
        return (truncated(block, shape[1], card.normalize) for block in merged.blocks())

    def write(folder: Path) -> IndexContent:
        asked = None if queries is None else truncated(np.asarray(queries.vectors), shape[1], card.normalize)
        write_ids(folder / IDS, merged.ids)
        if content.fields:
            assert collection is not None
            write_documents(folder, merged.fields(collection), content.fields, merged.row_of)
        if update is not NO_UPDATE:
            UpdateLog(folder / FOLDED).append(update)
        beside = sum(path.stat().st_size for path in folder.iterdir())
        considered = _considered(content, merged, asked, beside) if spec.kind == "auto" else ()
        stored = write_stored(folder, blocks, shape, spec.storage)
        sized = replace(content, largest_norm=stored.longest())
        # Its pages would count a second time beside those of the finished folder, which is opened from here on.
        del stored
        if considered:
            finished = decide(considered, lambda kind: _of_kind(folder, sized, kind, asked))
        else:
            finished = _of_kind(folder, sized, spec.kind, asked)
        if queries is None:
            probes = merged.rows(evenly_spaced(len(merged.ids), PROBE_COUNT))
        else:
            probes = np.asarray(queries.vectors[evenly_spaced(len(queries.ids), PROBE_COUNT)])
        make_probes(folder, finished, probes).save(folder)
        return finished

    return IndexStore(store).publish(
        content.fingerprint,
        write,
        functools.partial(changes.hand_on, discard=discard_updates),
        lambda version: (discard_updates or changes.may_reuse(version)) and passes_self_test(version),
    )


def retune(store: Path, queries: EncodedCorpus, target: float) -> Path:
    """Tune the current version's search effort again and publish the result as a version of its own.

    The files are the current version's, linked and not copied; manifest and probes are new.

    Args:
        store: The store's folder.
        queries: Vectors of queries that nothing was trained on, by the encoder that will search.
        target: Share of the exact ten best that is to be found.

    Returns:
        The folder of the version.

    Raises:
        EncoderMismatch: the queries do not lie in the documents' space.
        DataError: the kind does not reach the target.
        ArtifactError: nothing is published, a file is damaged, or the store cannot be written.
    """
    source = IndexStore(store).current()
    lease = hold(source)
    try:
        manifest = IndexManifest.load(source)
        check_files(source, manifest)
        before = manifest.content
        require_same_space(queries.card, before.document_encoder)
        content = replace(
            before,
            requested=replace(before.requested, target_recall=target),
            query_encoder=queries.card.fingerprint,
            query_card=queries.card,
            queries_fingerprint=queries.fingerprint,
        )

        def write(folder: Path) -> IndexContent:
            for entry in manifest.files:
                if entry.path != PROBES:
                    (folder / entry.path).hardlink_to(source / entry.path)
            asked = truncated(np.asarray(queries.vectors), before.dimension, before.document_encoder.normalize)
            finished = tuned(folder, content, asked, target)
            probes = queries.vectors[evenly_spaced(len(queries.vectors), PROBE_COUNT)]
            make_probes(folder, finished, probes).save(folder)
            return finished

        changes = Changes(store, source.name, [], START)
        return IndexStore(store).publish(
            content.fingerprint,
            write,
            changes.hand_on,
            lambda version: changes.may_reuse(version) and passes_self_test(version),
        )
    finally:
        lease.release()


def tuned(folder: Path, content: IndexContent, queries: Vectors, target: float) -> IndexContent:
    """Return what a folder holds with its search effort set by measuring it."""
    effort, tuning = tune(Opened(folder, content), queries, target)
    return replace(content, index=replace(content.index, **asdict(effort)), tuning=tuning.to_json())


def _of_kind(folder: Path, content: IndexContent, kind: IndexKind, queries: Vectors | None) -> IndexContent:
    """Build what a kind needs beside the stored vectors, and tune it where there are queries."""
    index = resolved(replace(content.requested, kind=kind), content.count, content.dimension)
    # Of a kind that did not do.
    (folder / ANN).unlink(missing_ok=True)
    write_ann(folder, StoredVectors.open(folder, index.storage), index)
    made = replace(content, index=index)
    return made if queries is None else tuned(folder, made, queries, index.target_recall)


def _considered(
    content: IndexContent, corpus: MergedCorpus, queries: Vectors | None, beside: int
) -> Sequence[Considered]:
    """Return what ``auto`` may take."""
    spec = content.requested
    if content.count < EXACT_BELOW:
        return exact(spec, content, beside)
    if queries is None:
        raise DataError("index kind auto: it measures with held-out queries; give some, or name a kind")
    sample = corpus.rows(sampled(content.count))
    cut = truncated(sample, content.dimension, content.document_encoder.normalize)
    return choose(spec, content, cut, queries, beside)


def _require_finite(corpus: EncodedCorpus) -> None:
    if not corpus.ids:
        raise DataError("no documents to index; encode a corpus that has some")
    for start in range(0, len(corpus.ids), BLOCK_ROWS):
        finite = np.isfinite(corpus.vectors[start : start + BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"document {corpus.ids[row]!r}: its vector is not finite; encode the corpus again")
        forget_pages(corpus.vectors)


def _field_types(
    corpus: EncodedCorpus, merged: MergedCorpus, collection: Collection | None, names: Sequence[str]
) -> Mapping[str, str]:
    if not names:
        return {}
    if collection is None or collection.corpus_fingerprint != corpus.texts_fingerprint:
        raise DataError("stored fields: the collection is not the one that was encoded; give that one")
    types = field_types(finite_fields(merged.fields(collection), names), names)
    for name in names:
        if name not in types:
            known = {key for _, fields in merged.fields(collection) for key in fields}
            if name in known:
                raise DataError(f"--fields: {name!r} is null in every document of {collection.name}; leave it out")
            raise DataError(f"--fields: no document of {collection.name} has {name!r}{did_you_mean(name, known)}")
    return types
