"""The manifest of an index version: what is in it, what made it, and the sha256 of each file.

faiss has no checksum of its own, and most flipped bits of a graph load in silence, so nothing of a
version is used before its files match the manifest. The manifest itself is bound by the version's
name, which ends in the first eight digits of its sha256, and in full by the store's ``CURRENT``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from index.documents import DOCUMENTS, POSITIONS
from retrieval_kd.artifacts import MANIFEST, FileEntry, Spec, file_sha256, read_json
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.errors import ArtifactError
from retrieval_kd.recipes.schema import IndexSpec

FORMAT_VERSION = 2


@dataclass(frozen=True)
class IndexContent:
    """What an index version holds.

    Attributes:
        requested: How it was to be searched.
        index: How it is searched: ``requested`` with every choice made and every number filled in.
        count: Number of documents.
        dimension: Width of the vectors as stored; at most the encoder's.
        largest_norm: Length of the longest stored vector; bounds the rounding error of any score.
        document_encoder: The encoder of the documents; queries must lie in its space.
        query_encoder: Fingerprint of the encoder whose queries it is for; empty if none was named.
        query_card: That encoder; None if none was named, or by a release that did not store it.
        encoding_fingerprint: The encoding the vectors come from.
        corpus_fingerprint: The documents alone.
        queries_fingerprint: The query vectors it was tuned and tested with; empty if there were none.
        fields: What each stored field holds, by name.
        tuning: How kind and search effort were chosen, as :mod:`index.tune` saw it; empty if they were given.
        metric: What a score is.
    """

    requested: IndexSpec
    index: IndexSpec
    count: int
    dimension: int
    largest_norm: float
    document_encoder: EncoderCard
    query_encoder: str
    encoding_fingerprint: str
    corpus_fingerprint: str
    queries_fingerprint: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    metric: Literal["inner_product"] = "inner_product"
    query_card: EncoderCard | None = None

    @property
    def fingerprint(self) -> str:
        """Return the identity of the build: two builds that share it hold the same."""
        config = {
            "index": asdict(self.requested),
            "fields": sorted(self.fields),
            "metric": self.metric,
            "format_version": FORMAT_VERSION,
        }
        inputs = {"encoding": self.encoding_fingerprint, "queries": self.queries_fingerprint}
        # Versions that name no query encoder keep the identity they had before this was part of it.
        if self.query_encoder:
            inputs["query_encoder"] = self.query_encoder
        return Spec("index", config, inputs=inputs).fingerprint


@dataclass(frozen=True)
class IndexManifest:
    """``manifest.json`` of one version.

    Attributes:
        number: The version's place in the store's history, from 1.
        parent: The version that was current when this one was made; empty for the first.
        created_at: When, in UTC, ISO 8601.
        producers: Versions of everything that can change the files.
        content: What the version holds.
        files: Every file beside the manifest.
    """

    number: int
    parent: str
    created_at: str
    producers: Mapping[str, str]
    content: IndexContent
    files: tuple[FileEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest with the fingerprints that follow from it spelled out."""
        content = self.content
        return {
            **asdict(self),
            "format_version": FORMAT_VERSION,
            "content": {
                **asdict(content),
                "document_encoder": content.document_encoder.to_json(),
                "query_card": None if content.query_card is None else content.query_card.to_json(),
                "query_space": content.document_encoder.space_fingerprint,
                "fingerprint": content.fingerprint,
            },
        }

    @classmethod
    def load(cls, version: Path) -> IndexManifest:
        """Read the manifest of a version folder; its files are checked by :func:`check_files`.

        Raises:
            ArtifactError: no manifest, one that does not belong to the folder's name, or one of
                another format.
        """
        path = version / MANIFEST
        if not path.is_file():
            raise ArtifactError(f"{version}: no {MANIFEST}, so this is no index version; build the index")
        if not version.name.endswith(f"-{file_sha256(path)[:8]}"):
            raise ArtifactError(
                f"{path}: its sha256 does not fit the folder's name, so the manifest was changed or the folder "
                "renamed; build the index again"
            )
        raw = read_json(path)
        try:
            if raw["format_version"] != FORMAT_VERSION:
                raise ArtifactError(
                    f"{path}: format_version {raw['format_version']}, this version reads {FORMAT_VERSION}; "
                    "build the index again"
                )
            held = {key: value for key, value in raw["content"].items() if key not in ("query_space", "fingerprint")}
            asker = held.get("query_card")
            content = {
                **held,
                "query_card": None if asker is None else EncoderCard.from_json(asker, str(path)),
                "requested": IndexSpec(**held["requested"]),
                "index": IndexSpec(**held["index"]),
                "document_encoder": EncoderCard.from_json(held["document_encoder"], str(path)),
            }
            return cls(
                number=raw["number"],
                parent=raw["parent"],
                created_at=raw["created_at"],
                producers=raw["producers"],
                content=IndexContent(**content),
                files=tuple(FileEntry(**entry) for entry in raw["files"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}: not an index manifest ({error}); build the index again") from None

    @property
    def bytes(self) -> int:
        """Return the size of all files in bytes."""
        return sum(entry.bytes for entry in self.files)

    @property
    def bytes_per_doc(self) -> float:
        """Return the size for each document of what is searched, in bytes; stored fields say nothing of an index."""
        stored = sum(entry.bytes for entry in self.files if entry.path in (DOCUMENTS, POSITIONS))
        return (self.bytes - stored) / self.content.count


def check_files(version: Path, manifest: IndexManifest) -> None:
    """Compare size and sha256 of every file with the manifest; sizes first, as they cost nothing.

    Raises:
        ArtifactError: names the first file that is missing, of another size, or of other bytes.
    """
    check_sizes(version, manifest)
    for entry in manifest.files:
        if file_sha256(version / entry.path) != entry.sha256:
            raise ArtifactError(
                f"{version / entry.path}: bytes differ from the manifest's sha256; build the index again"
            )


def check_sizes(version: Path, manifest: IndexManifest) -> None:
    """Compare the size of every file with the manifest.

    Raises:
        ArtifactError: names the first file that is missing or of another size.
    """
    for entry in manifest.files:
        path = version / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "missing" if size is None else f"{size} bytes"
            raise ArtifactError(f"{path}: {found}, the manifest says {entry.bytes} bytes; build the index again")
