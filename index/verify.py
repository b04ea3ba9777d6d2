"""Looking at a store: is every byte as it was published, and what is published."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from index.manifest import IndexManifest, check_files
from index.search import Searcher
from index.store import IndexStore
from index.updates import UpdateLog, summed


def verify(store: Path) -> list[str]:
    """Check every version of a store and its log of updates, open the current one and run its self-test.

    Returns:
        The names of the versions, oldest first.

    Raises:
        ArtifactError: nothing is published, or a file is missing, torn or changed; names the file.
    """
    with Searcher.open(store) as searcher:
        searcher.self_test()
    versions = IndexStore(store).versions()
    for version in versions:
        check_files(version, IndexManifest.load(version))
        UpdateLog.of(store, version.name).read()
    return [version.name for version in versions]


def inspect(store: Path) -> dict[str, Any]:
    """Return what the current version holds, from its manifest alone, JSON-serialisable.

    Raises:
        ArtifactError: nothing is published, or the manifest is not as it was published.
    """
    current = IndexStore(store).current()
    manifest = IndexManifest.load(current)
    content = manifest.content
    updates = summed(UpdateLog.of(store, current.name).read()[0])
    return {
        "version": current.name,
        "parent": manifest.parent,
        "versions": [version.name for version in IndexStore(store).versions()],
        "created_at": manifest.created_at,
        "requested": asdict(content.requested),
        "index": asdict(content.index),
        "metric": content.metric,
        "count": content.count,
        "dimension": content.dimension,
        "updates": len(updates.doc_ids) + len(updates.deleted),
        "bytes": manifest.bytes,
        "bytes_per_doc": manifest.bytes_per_doc,
        "document_encoder": content.document_encoder.to_json(),
        "query_encoder": content.query_encoder,
        "query_space": content.document_encoder.space_fingerprint,
        "corpus_fingerprint": content.corpus_fingerprint,
        "fields": dict(content.fields),
        "tuning": dict(content.tuning),
        "producers": dict(manifest.producers),
        "files": [asdict(entry) for entry in manifest.files],
    }
