"""Looking at a store: is every byte as it was published, and what is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from index.manifest import IndexManifest, check_files
from index.search import Searcher
from index.store import IndexStore
from index.updates import UpdateLog, summed
from retrieval_kd.errors import ArtifactError

_AGAIN = "; build the index again"


def verify(store: Path) -> list[str]:
    """Check every version of a store and its log of updates, open the current one and run its self-test.

    Returns:
        The names of the versions, oldest first.

    Raises:
        ArtifactError: nothing is published, or a file is missing, torn or changed; names a file of each version that
            is damaged, and says whether the current one is.
    """
    current = IndexStore(store).current()
    versions = IndexStore(store).versions()
    # Its own advice is the right one: no other version has these updates.
    UpdateLog.of(store, current.name).read()
    damage: dict[Path, str] = {}
    for version in versions:
        try:
            if version == current:
                with Searcher.open(store) as searcher:
                    searcher.self_test()
            check_files(version, IndexManifest.load(version))
            UpdateLog.of(store, version.name).read()
        except ArtifactError as error:
            damage[version] = str(error).removesuffix(_AGAIN)
    if damage:
        found = ", and ".join(damage.values())
        raise ArtifactError(
            f"{found}; {len(damage)} of {len(versions)} versions damaged, {_advice(store, current, versions, damage)}"
        )
    return [version.name for version in versions]


def _advice(store: Path, current: Path, versions: Sequence[Path], damage: Mapping[Path, str]) -> str:
    """Return what becomes of the current version and how to be rid of the damage; a build leaves old versions alone."""
    if current in damage:
        whole = [version.name for version in versions if version not in damage]
        publish = f", or go back: rkd index publish {store} {whole[-1]}" if whole else ""
        return f"the current one among them{_AGAIN}{publish}"
    newer = len(versions) - 1 - versions.index(max(damage))
    if newer == 0:
        return f"the current one is whole; remove the folder {max(damage)}"
    return f"the current one is whole; rkd index gc {store} --keep {newer} removes what is damaged and what is older"


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
