"""Changes to a published version: an append-only log beside it, on disk before it is acknowledged.

``STORE/updates/<version>.log`` starts with eight bytes of magic; then each record is its length and crc32 (two
little-endian uint32) and its body: one line of JSON, then the vectors of its upserts, float32. A record is one call
of :meth:`UpdateLog.append`, all of it or none.

A writer that dies leaves at most one torn record at the end. Readers stop before it, and the next writer cuts it
off. A whole record where that one should end can only be damage, and is an error: a body says itself how long it is,
so it is found again even when its length was changed. A last record of which other bits were changed passes for torn.

A build folds the updates of the version that was current into its own: their sum lies in it as ``updates.log``, so
that a further build from the same corpus does not lose them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrieval_kd.artifacts import fsync_folder
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import ArtifactError, DataError

UPDATES = "updates"
FOLDED = "updates.log"
_MAGIC = b"RKDUPD1\n"
_HEAD = struct.Struct("<II")
_BODY = b'{"upsert":['
_LOCK = ".lock"


@dataclass(frozen=True)
class Update:
    """What one call changed.

    Attributes:
        doc_ids: Documents that were added or replaced, each once.
        vectors: float32 ``[len(doc_ids), d]``, as wide as the encoder makes them.
        fields: What is stored with each.
        deleted: Documents that were removed; none of them in ``doc_ids``.
    """

    doc_ids: tuple[str, ...]
    vectors: Vectors
    fields: tuple[Mapping[str, Any], ...]
    deleted: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the record's body.

        Raises:
            DataError: a field holds a number that JSON has not.
        """
        head = {
            "upsert": list(self.doc_ids),
            "width": int(self.vectors.shape[1]) if self.doc_ids else 0,
            "fields": [dict(fields) for fields in self.fields],
            "delete": list(self.deleted),
        }
        try:
            line = json.dumps(head, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except ValueError:
            raise DataError("update: a field holds NaN or infinity, which JSON has not; leave it out") from None
        return line + np.ascontiguousarray(self.vectors, dtype="<f4").tobytes()

    @classmethod
    def from_bytes(cls, body: bytes) -> Update:
        """Read a record's body."""
        line, _, data = body.partition(b"\n")
        head = json.loads(line)
        ids = tuple(head["upsert"])
        vectors = np.frombuffer(data, dtype="<f4").reshape(len(ids), head["width"])
        return cls(ids, vectors, tuple(head["fields"]), tuple(head["delete"]))


class Place(NamedTuple):
    """How far a log was read: the end of its last whole record, and how to know that record again.

    Attributes:
        inode: The file; a log may be replaced by another, in which its places mean nothing.
        end: Where the next record will be; 0 before anything was read.
        last: Where the last whole record begins.
        head: Its length and checksum; the magic when there is no record.
    """

    inode: int
    end: int
    last: int
    head: bytes


START = Place(0, 0, 0, b"")


class News(NamedTuple):
    """What was read of a log.

    Attributes:
        updates: The whole records.
        place: The end of the last one.
        anew: Whether they are the whole of another log than the one that was asked for more of.
    """

    updates: list[Update]
    place: Place
    anew: bool


class UpdateLog:
    """A log of updates; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        """Name the file."""
        self.path = path
        self._name = str(path)
        self._written = START
        self._entry_synced = False

    @classmethod
    def of(cls, store: Path, version: str) -> UpdateLog:
        """Return the log of a version of a store."""
        return cls(store / UPDATES / f"{version}.log")

    @property
    def state(self) -> tuple[int, int, int]:
        """Return what differs after every change to the log: its file, size and time; zeros when there is none."""
        try:
            found = os.stat(self._name)  # noqa: PTH116  asked before every search, and Path takes longer
        except FileNotFoundError:
            return 0, 0, 0
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, since: Place = START) -> News:
        """Return the whole records from a place on; all of them when the log is no longer that of the place.

        Args:
            since: A place that an earlier call returned.

        Raises:
            ArtifactError: the file is no log, or is damaged before its last record; names it.
        """
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                inode, size = found.st_ino, found.st_size
                file.seek(since.last)
                # A file that took the place of another may have its inode as well, so the record is looked at too.
                same = inode == since.inode and size >= since.end and file.read(_HEAD.size) == since.head
                place = since if same else START
                file.seek(place.end)
                content = file.read()
        except FileNotFoundError:
            return News([], START, since.end > 0)
        anew = since.end > 0 and place.end == 0
        start, at, last, head = place.end, 0, place.last, place.head
        if start == 0:
            if not content.startswith(_MAGIC):
                if _MAGIC.startswith(content.rstrip(b"\0")):
                    return News([], START, anew)
                raise ArtifactError(f"{self.path}: not a log of updates; restore it or remove it and its updates")
            at, head = len(_MAGIC), _MAGIC
        updates = []
        while (body := _record(content, at)) is not None:
            try:
                updates.append(Update.from_bytes(body))
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(start + at, str(error)) from None
            last, head = start + at, content[at : at + _HEAD.size]
            at += _HEAD.size + len(body)
        if not _is_torn(content, at):
            raise self._damaged(start + at, "its length or checksum was changed: what follows was whole")
        return News(updates, Place(inode, start + at, last, head), anew)

    def append(self, update: Update) -> None:
        """Add a record; on return it is on disk and every reader sees it.

        The caller holds :func:`writing`.

        Raises:
            ArtifactError: it cannot be written; what was in the log before stays, and nothing of the record.
        """
        try:
            folder = self.path.parent
            folder.mkdir(parents=True, exist_ok=True)
            # What this object wrote or read is whole already; others may have written since.
            self._written = self.read(self._written).place
            end = self._written.end
            body = update.to_bytes()
            head = _HEAD.pack(len(body), zlib.crc32(body))
            record = (b"" if end else _MAGIC) + head + body
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                # Also cuts off what a writer that died has left.
                os.ftruncate(descriptor, end)
                self._write(descriptor, record, end)
                after = end + len(record)
                self._written = Place(os.fstat(descriptor).st_ino, after, after - len(body) - len(head), head)
            finally:
                os.close(descriptor)
            if end == 0 or not self._entry_synced:
                # Whoever made the file may have died before its name was on disk.
                fsync_folder(folder)
                fsync_folder(folder.parent)
                self._entry_synced = True
        except OSError as error:
            raise ArtifactError(
                f"{self.path}: cannot write the update ({error.strerror or error}); nothing of it was kept"
            ) from error

    def replace(self, updates: Sequence[Update]) -> None:
        """Put other updates in the place of all; the caller holds :func:`writing`.

        Raises:
            ArtifactError: they cannot be written; the log is as it was.
        """
        other = UpdateLog(self.path.with_suffix(".new"))
        other.path.unlink(missing_ok=True)
        if updates:
            other.append(summed(updates))
            other.path.replace(self.path)
            fsync_folder(self.path.parent)
        else:
            self.path.unlink(missing_ok=True)
            # Else a power cut could bring back what was discarded.
            fsync_folder(self.path.parent)

    def _write(self, descriptor: int, record: bytes, end: int) -> None:
        try:
            written = 0
            while written < len(record):
                written += os.pwrite(descriptor, record[written:], end + written)
            os.fsync(descriptor)
        except OSError:
            # After a failed fsync nobody knows what is on disk; without these bytes it does not matter.
            os.ftruncate(descriptor, end)
            raise

    def _damaged(self, place: int, why: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: damaged at byte {place} ({why}); restore it, or remove it and its updates")


@contextlib.contextmanager
def writing(store: Path) -> Iterator[None]:
    """Wait for, and hold, the right to change any log of a store, or which version its updates go to.

    Raises:
        OSError: the lock cannot be made; the folder may be read-only.
    """
    folder = store / UPDATES
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def summed(updates: Sequence[Update]) -> Update:
    """Return one update that does what several did, one after another; documents in ascending order."""
    living: dict[str, tuple[Update, int]] = {}
    touched: set[str] = set()
    for update in updates:
        living.update((doc_id, (update, i)) for i, doc_id in enumerate(update.doc_ids))
        for doc_id in update.deleted:
            living.pop(doc_id, None)
        touched.update(update.doc_ids, update.deleted)
    places = [living[doc_id] for doc_id in sorted(living)]
    width = max((update.vectors.shape[1] for update in updates), default=0)
    vectors = np.asarray([update.vectors[i] for update, i in places], dtype=np.float32).reshape(len(places), width)
    fields = tuple(update.fields[i] for update, i in places)
    return Update(tuple(sorted(living)), vectors, fields, tuple(sorted(touched - living.keys())))


def _record(content: bytes, at: int) -> bytes | None:
    """Return the body of the record at a place, if it is whole."""
    if at + _HEAD.size > len(content):
        return None
    length, checksum = _HEAD.unpack_from(content, at)
    body = content[at + _HEAD.size : at + _HEAD.size + length]
    # No body is empty, and a disk that lost power may leave zeros.
    return body if length and len(body) == length and zlib.crc32(body) == checksum else None


def _is_torn(content: bytes, at: int) -> bool:
    """Return whether what follows a place can be the start of a record that was never finished."""
    rest = content[at:]
    if len(rest) < _HEAD.size or not any(rest):
        return True
    length, _ = _HEAD.unpack_from(rest)
    return not any(rest[_HEAD.size + int(length) :]) and not _has_whole_record(rest)


def _has_whole_record(content: bytes) -> bool:
    """Return whether some record is whole by what its body says of its length and its head of its checksum."""
    at = content.find(_BODY, _HEAD.size)
    while at >= 0:
        _, checksum = _HEAD.unpack_from(content, at - _HEAD.size)
        length = _body_length(content, at)
        if length and zlib.crc32(content[at : at + length]) == checksum:
            return True
        at = content.find(_BODY, at + 1)
    return False


def _body_length(content: bytes, at: int) -> int:
    """Return how long the body at a place is; 0 when its line of JSON is not whole."""
    end = content.find(b"\n", at) + 1
    try:
        head = json.loads(content[at:end])
        return end - at + 4 * len(head["upsert"]) * int(head["width"])
    except (ValueError, KeyError, TypeError):
        return 0
