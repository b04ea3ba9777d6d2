"""The index store: immutable versions and one pointer to the version that is served.

    store/
      CURRENT                        "<version> <sha256 of its manifest>", one line
      versions/0000000001-<8 hex>/   read-only from the moment it has this name

A process that maps a file dies when the file is changed in place (truncation is SIGBUS, overwriting
SIGSEGV), so files appear under their final name finished and are never written again. A publisher
that is killed leaves the old pointer or the new one, each to a whole version.

One build at a time holds the store's lock, for as long as it takes. Moving the pointer, removing versions and
appending to a log take turns by :func:`index.updates.writing`, and none of them takes long, so a rollback need not wait
for a build and an update never goes to a version that is just being left.

Whoever reads a version holds a shared lock on its manifest; :meth:`IndexStore.collect` takes the exclusive
one before it removes a version, so no version disappears under a reader that is still opening its files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from index.files import is_passing
from index.manifest import IndexContent, IndexManifest, check_files
from index.updates import UpdateLog, writing
from retrieval_kd.artifacts import (
    MANIFEST,
    FileEntry,
    atomic_write,
    file_sha256,
    fsync_folder,
    locked,
    producers,
    write_json,
)
from retrieval_kd.errors import ArtifactError, RkdError

CURRENT = "CURRENT"
VERSIONS = "versions"
KEPT_VERSIONS = 3
_UNFINISHED = ".tmp-"
_DOOMED = ".old-"
_NAME = re.compile(r"[0-9]{10}-[0-9a-f]{8}")
_POINTER = re.compile(rf"({_NAME.pattern}) ([0-9a-f]{{64}})\n")
_READ_ONLY = 0o444


class IndexStore:
    """A folder of index versions."""

    def __init__(self, path: Path) -> None:
        """Name a store; it comes into being with its first version."""
        self._path = path

    def current(self) -> Path:
        """Return the folder of the version that is served.

        Raises:
            ArtifactError: nothing was published, or the pointer or the manifest it names was changed.
        """
        pointer = self._path / CURRENT
        if not pointer.is_file():
            raise ArtifactError(f"{self._path}: no {CURRENT}, so no index is published here; build one")
        match = _POINTER.fullmatch(pointer.read_bytes().decode("utf-8", errors="replace"))
        if match is None:
            raise ArtifactError(f"{pointer}: not a version and a sha256; build the index again")
        version = self._path / VERSIONS / match[1]
        manifest = version / MANIFEST
        if not manifest.is_file():
            raise ArtifactError(f"{pointer}: names {match[1]}, which has no {MANIFEST}; build the index again")
        if file_sha256(manifest) != match[2]:
            raise ArtifactError(f"{manifest}: bytes differ from the sha256 in {CURRENT}; build the index again")
        return version

    def versions(self) -> list[Path]:
        """Return the folders of all published versions, oldest first; what has another name is somebody else's."""
        folder = self._path / VERSIONS
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name) and path.is_dir())

    def publish(
        self,
        fingerprint: str,
        write: Callable[[Path], IndexContent],
        hand_on: Callable[[Path], None],
        works: Callable[[Path], bool],
    ) -> Path:
        """Make a version current, writing it only if no version that works holds the same.

        While it is written the current version takes updates, and another may become current.

        Args:
            fingerprint: Identity of what the version holds.
            write: Writes the version's files into the empty folder it is given and returns what they are.
            hand_on: Called with the version just before it becomes the current one; no update comes in between.
            works: Says whether a version that is there already can be used, by this build and on this machine.

        Returns:
            The version's folder.

        Raises:
            ArtifactError: another process is building, or the files cannot be written; the version
                that was current stays so.
        """
        try:
            (self._path / VERSIONS).mkdir(parents=True, exist_ok=True)
            with locked(self._path):
                version = self._find(fingerprint, works) or self._add(write)
                with hold(version), writing(self._path):
                    hand_on(version)
                    self._point_at(version)
        except OSError as error:
            raise self._unwritable(error) from error
        return version

    def publish_existing(self, name: str) -> Path:
        """Make a version that the store already has the current one, after checking every byte of it.

        Args:
            name: The version's name, such as ``0000000002-1a2b3c4d``.

        Returns:
            The version's folder.

        Raises:
            ArtifactError: no such version, a damaged one, or the pointer cannot be written; the version that was
                current stays so.
        """
        version = self._named(name)
        try:
            with hold(version):
                check_files(version, IndexManifest.load(version))
                with writing(self._path):
                    self._point_at(version)
        except OSError as error:
            raise self._unwritable(error) from error
        return version

    def rollback(self) -> Path:
        """Make the newest version older than the current one current, after checking every byte of it.

        Raises:
            ArtifactError: there is no older version, it is damaged, or the pointer cannot be written; the version
                that was current stays so.
        """
        current = self.current()
        older = [version for version in self.versions() if version.name < current.name]
        if not older:
            raise ArtifactError(f"{self._path}: {current.name} is the oldest version kept; build the index again")
        return self.publish_existing(older[-1].name)

    def collect(self, keep: int = KEPT_VERSIONS) -> list[str]:
        """Remove versions that are neither current, nor among the newest, nor open in any process.

        Args:
            keep: How many of the newest versions stay.

        Returns:
            The names of the versions removed, oldest first.

        Raises:
            ArtifactError: ``keep`` is below 1, nothing is published, or a version cannot be removed.
        """
        if keep < 1:
            raise ArtifactError(
                f"{self._path}: keep {keep} versions; at least the current one stays, so give 1 or more"
            )
        # Before the lock, which would make folders where there is no store.
        self.current()
        try:
            with writing(self._path):
                current = self.current()
                old = [version for version in self.versions()[:-keep] if version != current]
                removed = [version.name for version in old if self._doom(version)]
            # Without the lock, for a large version takes long and updates wait for it. Some may be another's, who was
            # stopped or removes them just now.
            for doomed in (self._path / VERSIONS).glob(f"{_DOOMED}*"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(doomed)
            return removed
        except OSError as error:
            raise ArtifactError(f"{self._path}: cannot remove a version ({error.strerror or error})") from error

    def _named(self, name: str) -> Path:
        if not (version := self._path / VERSIONS / name).is_dir() or version not in self.versions():
            names = ", ".join(version.name for version in self.versions()) or "none"
            raise ArtifactError(f"{self._path}: no version {name!r}; it has {names}")
        return version

    def _doom(self, version: Path) -> bool:
        """Make a version and its updates vanish, unless somebody reads it; its files are still to be removed."""
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context((version / MANIFEST).open("rb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except FileNotFoundError:
                pass  # a damaged version, which nobody can open
            # Under a hidden name it is no version any more, wherever the removal is stopped.
            version.rename(version.with_name(f"{_DOOMED}{version.name}"))
            UpdateLog.of(self._path, version.name).path.unlink(missing_ok=True)
        return True

    def _unwritable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: cannot write the index ({error.strerror or error}); what was published is unchanged"
        )

    def _find(self, fingerprint: str, works: Callable[[Path], bool]) -> Path | None:
        for version in reversed(self.versions()):
            try:
                same = IndexManifest.load(version).content.fingerprint == fingerprint
            except RkdError:
                continue
            if same and works(version):
                return version
        return None

    def _add(self, write: Callable[[Path], IndexContent]) -> Path:
        folder = self._path / VERSIONS
        # The lock is ours, so whatever is unfinished belongs to a publisher that was killed.
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        unfinished.mkdir()
        try:
            content = write(unfinished)
            number = 1 + max((int(version.name.split("-")[0]) for version in self.versions()), default=0)
            version = folder / f"{number:010d}-{self._seal(unfinished, content, number)[:8]}"
            unfinished.rename(version)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        fsync_folder(folder)
        check_files(version, IndexManifest.load(version))
        return version

    def _seal(self, folder: Path, content: IndexContent, number: int) -> str:
        """Write the manifest last, put everything on disk read-only, and return the manifest's sha256."""
        files = sorted(path for path in folder.iterdir())
        manifest = IndexManifest(
            number=number,
            parent=self._parent(),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            producers=producers(),
            content=content,
            files=tuple(FileEntry(path.name, path.stat().st_size, file_sha256(path)) for path in files),
        )
        write_json(folder / MANIFEST, manifest.to_json())
        for path in (*files, folder / MANIFEST):
            path.chmod(_READ_ONLY)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(folder)
        return file_sha256(folder / MANIFEST)

    def _parent(self) -> str:
        try:
            return self.current().name
        except ArtifactError:
            return ""

    def _point_at(self, version: Path) -> None:
        line = f"{version.name} {file_sha256(version / MANIFEST)}\n"
        pointer = self._path / CURRENT
        if not pointer.is_file() or pointer.read_bytes() != line.encode():
            with atomic_write(pointer) as file:
                file.write(line)


class Lease:
    """A shared lock on a version, held until it is released or forgotten."""

    def __init__(self, descriptor: int) -> None:
        """Take over a locked file; use :func:`hold`."""
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let the version be collected; once is enough, and twice is no error."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(version: Path) -> Lease:
    """Keep a version from being collected while the lease that is returned lives.

    Raises:
        ArtifactError: the version has no manifest, or is just being removed.
    """
    manifest = version / MANIFEST
    try:
        descriptor = os.open(manifest, os.O_RDONLY)
    except OSError as error:
        if is_passing(error):
            raise
        raise ArtifactError(f"{version}: no {MANIFEST}, so this is no index version; build the index") from None
    lease = Lease(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # The collector may have renamed the folder between the opening of the file and its locking.
        still_there = manifest.stat().st_ino == os.fstat(descriptor).st_ino
    except OSError as error:
        if is_passing(error):
            raise
        still_there = False
    if not still_there:
        lease.release()
        raise ArtifactError(f"{version}: is just being removed; open the current version instead")
    return lease
