"""What a build takes over of the updates to the version that is current, and what it hands on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from index.manifest import IndexManifest
from index.merge import NO_UPDATE
from index.store import VERSIONS, IndexStore
from index.updates import FOLDED, START, Place, Update, UpdateLog, summed, writing
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
    """

    store: Path
    version: str
    updates: Sequence[Update]
    read_to: Place

    @classmethod
    def of(cls, store: Path) -> Changes:
        """Read the updates of the current version.

        Raises:
            ArtifactError: a log is damaged; names it.
        """
        try:
            version = IndexStore(store).current()
        except ArtifactError:
            return cls(store, "", (), START)
        folded = UpdateLog(version / FOLDED).read().updates
        news, read_to, _ = UpdateLog.of(store, version.name).read()
        return cls(store, version.name, [*folded, *news], read_to)

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

    @contextlib.contextmanager
    def handed_on(self, version: Path, discard: bool = False) -> Iterator[None]:
        """Hand the updates that came while the build ran to its version; none can come until the block ends.

        Args:
            version: The build's version; it may be one that was there already.
            discard: Forget what that version's own log has.
        """
        with writing(self.store):
            late = self._late() if self.version != version.name or discard else []
            log = UpdateLog.of(self.store, version.name)
            if discard:
                log.replace(late)
            elif late:
                log.append(summed(late))
            yield

    def _late(self) -> list[Update]:
        return UpdateLog.of(self.store, self.version).read(self.read_to).updates if self.version else []
