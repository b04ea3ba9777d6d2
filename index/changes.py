"""What a build takes over of the updates to the version that is current, and what it hands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from index.documents import record_batch
from index.manifest import IndexManifest
from index.merge import NO_UPDATE
from index.store import VERSIONS, IndexStore, Lease, hold
from index.updates import FOLDED, START, Place, Update, UpdateLog, summed
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.errors import ArtifactError, DataError


@dataclass(frozen=True)
class Changes:
    """The updates to a store at the moment a build begins.

    Attributes:
        store: The store's folder.
        version: The version that is current; empty when there is none.
        updates: Those that were folded into it, then those in its log.
        read_to: Where in its log the next one will be.
        lease: Keeps the version, and with it what is still to come into its log, from being collected.
    """

    store: Path
    version: str
    updates: Sequence[Update]
    read_to: Place
    lease: Lease | None = None

    @classmethod
    def of(cls, store: Path) -> Changes:
        """Read the updates of the current version.

        Raises:
            ArtifactError: a log is damaged, or the version is just being removed; names it.
        """
        version = _current(store)
        if version is None:
            return cls(store, "", (), START)
        lease = hold(version)
        folded = UpdateLog(version / FOLDED).read().updates
        news, read_to, _ = UpdateLog.of(store, version.name).read()
        return cls(store, version.name, [*folded, *news], read_to, lease)

    def since_first(self, encoder: EncoderCard) -> Update:
        """Return the sum of all updates.

        Raises:
            DataError: they are vectors of another encoder.
        """
        if not self.updates:
            return NO_UPDATE
        theirs = IndexManifest.load(self.store / VERSIONS / self.version).content.document_encoder
        if theirs.fingerprint != encoder.fingerprint:
            raise DataError(
                f"{self.store}: its updates were encoded by {theirs.name!r}, the corpus by {encoder.name!r}; encode "
                "those documents with the corpus and discard the updates"
            )
        return summed(self.updates)

    def may_reuse(self, version: Path) -> bool:
        """Return whether a build that comes to the same as a version that is there already may publish that one.

        Updates of its own would come back with it, though the build began with another version, as after a rollback.
        """
        return version.name == self.version or not UpdateLog.of(self.store, version.name).path.exists()

    def hand_on(self, version: Path, discard: bool = False) -> None:
        """Give the updates that came while the build ran to its version; the caller holds :func:`writing`.

        When another version became current meanwhile, all of its updates are given as well: what it answers with
        is not forgotten.

        Args:
            version: The build's version; it may be one that was there already.
            discard: Forget what that version's own log has.

        Raises:
            DataError: they are vectors of another encoder, or a field is not of the version's type.
            ArtifactError: a log is damaged or cannot be written, or it is not known which updates to discard.
        """
        parts = [replace(self, updates=self._late())] if self.version != version.name or discard else []
        current = _current(self.store)
        if current is not None and current.name not in (self.version, version.name):
            if discard:
                raise ArtifactError(
                    f"{self.store}: {current.name} became current during the build, so which updates to discard is "
                    f"unknown; build again, which takes {version.name} as it is"
                )
            parts.append(Changes.of(self.store))
        content = IndexManifest.load(version).content
        updates = [part.since_first(content.document_encoder) for part in parts if part.updates]
        record_batch([fields for update in updates for fields in update.fields], content.fields)
        log = UpdateLog.of(self.store, version.name)
        if discard:
            log.replace(updates)
        elif updates:
            log.append(summed(updates))

    def _late(self) -> list[Update]:
        return UpdateLog.of(self.store, self.version).read(self.read_to).updates if self.version else []


def _current(store: Path) -> Path | None:
    try:
        return IndexStore(store).current()
    except ArtifactError:
        return None
