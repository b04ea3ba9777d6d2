"""The index store: immutable versions and one pointer to the version that is served.

    store/
      CURRENT                        "<version> <sha256 of its manifest>", one line
      versions/0000000001-<8 hex>/   read-only from the moment it has this name

A process that maps a file dies when the file is changed in place (truncation is SIGBUS, overwriting
SIGSEGV), so files appear under their final name finished and are never written again. A publisher
that is killed leaves the old pointer or the new one, each to a whole version.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from index.manifest import IndexContent, IndexManifest, check_files, is_sound
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
_UNFINISHED = ".tmp-"
_POINTER = re.compile(r"(\d{10}-[0-9a-f]{8}) ([0-9a-f]{64})\n")
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
        """Return the folders of all published versions, oldest first."""
        folder = self._path / VERSIONS
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []

    def publish(self, content: IndexContent, write: Callable[[Path], None]) -> Path:
        """Make a version current, writing it only if no sound version holds the same.

        Args:
            content: What the version holds.
            write: Writes the version's files into the empty folder it is given.

        Returns:
            The version's folder.

        Raises:
            ArtifactError: another process is publishing, or the files cannot be written; the version
                that was current stays so.
        """
        try:
            (self._path / VERSIONS).mkdir(parents=True, exist_ok=True)
            with locked(self._path):
                version = self._find(content) or self._add(content, write)
                self._point_at(version)
        except OSError as error:
            raise ArtifactError(
                f"{self._path}: cannot write the index ({error.strerror or error}); what was published is unchanged"
            ) from error
        return version

    def _find(self, content: IndexContent) -> Path | None:
        for version in reversed(self.versions()):
            try:
                same = IndexManifest.load(version).content.fingerprint == content.fingerprint
            except RkdError:
                continue
            if same and is_sound(version):
                return version
        return None

    def _add(self, content: IndexContent, write: Callable[[Path], None]) -> Path:
        folder = self._path / VERSIONS
        # The lock is ours, so whatever is unfinished belongs to a publisher that was killed.
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        unfinished.mkdir()
        try:
            write(unfinished)
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
