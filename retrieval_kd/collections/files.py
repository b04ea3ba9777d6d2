"""What the file layouts share: lines with their place, an offset index, ids, judgements, texts by id.

Documents never all sit in memory, nor do their ids. One pass over the corpus file checks every line and
keeps a hash of each id and the byte its line starts at, 16 bytes for a document; a text is read from the
disk when asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from retrieval_kd.artifacts import file_sha256
from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress

_SPLIT_ORDER = {"train": 0, "dev": 1, "test": 2}
_REPORT_BYTES = 1 << 20
_INTEGER = re.compile(r"-?[0-9]+")
# Grades in the field are single digits. pytrec_eval allocates memory by the highest one, so that a slip such as a
# document id in the grade's column would take tens of gigabytes.
HIGHEST_GRADE = 1_000
# Characters of the longest 32-bit number: pytrec_eval takes no more than 64 bits, and Python no thousands of digits.
_LONGEST_GRADE = 11


class Line(NamedTuple):
    """One line of a file: where it stands (``file:line``), its first byte, and its text without line end."""

    where: str
    offset: int
    text: str


def read_lines(path: Path) -> Iterator[Line]:
    """Stream the lines of a UTF-8 file, blank ones left out; only a line feed ends a line.

    Raises:
        DataError: the file cannot be read or a line is not UTF-8; names file and line.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}); the layout needs this file") from None
    offset = 0
    with file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(raw, where)
            if text.strip():
                yield Line(where, offset, text)
            offset += len(raw)


def _decode(raw: bytes, where: str) -> str:
    try:
        # "utf-8-sig" also drops the mark that some editors put before the first line.
        return raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def checked_id(value: str, where: str, kind: str) -> str:
    """Return an id that survives a TREC file, whose columns are split at white space.

    Raises:
        DataError: the id is empty or has white space in it; names the place.
    """
    if not value:
        raise DataError(f"{where}: the {kind} id is empty; give every {kind} an id of its own")
    if value.split() != [value]:
        raise DataError(f"{where}: {kind} id {value!r} has white space, which breaks TREC files; replace it")
    return value


class Offsets:
    """Where each document's line starts, by a hash of 64 bits of its id."""

    def __init__(self, hashes: array[int], starts: array[int]) -> None:
        """Sort what one pass over the file found."""
        keys = np.frombuffer(hashes, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._starts = np.frombuffer(starts, dtype=np.int64)[order]

    @property
    def repeated(self) -> frozenset[int]:
        """Return the hashes that several lines have: ids that occur twice."""
        return frozenset(self._keys[1:][self._keys[1:] == self._keys[:-1]].tolist())

    def find(self, doc_id: str) -> int | None:
        """Return the first byte of a document's line; None where no id has its hash."""
        key = np.uint64(_hash(doc_id))
        place = int(np.searchsorted(self._keys, key))
        return int(self._starts[place]) if place < len(self._keys) and self._keys[place] == key else None

    def __contains__(self, doc_id: object) -> bool:
        return isinstance(doc_id, str) and self.find(doc_id) is not None


def _hash(doc_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=8).digest())


class CorpusFile:
    """A file with one document a line, read by streaming or by id.

    The file must not change while it is open here: offsets and sha256 are taken once.
    """

    def __init__(self, path: Path, parse: Callable[[str, str], Document]) -> None:
        """Take the file and how a line, given its text and its ``file:line``, becomes a document."""
        self.path = path
        self._parse = parse

    @cached_property
    def offsets(self) -> Offsets:
        """Return the first byte of each document's line.

        Raises:
            DataError: a line is not a document, an id occurs twice, or there is no document at all.
        """
        hashes, starts = array("Q"), array("q")
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; the layout needs it")
        reported = 0
        with progress(f"read {self.path.name}", self.path.stat().st_size, "bytes") as advance:
            for line in read_lines(self.path):
                hashes.append(_hash(self._parse(line.text, line.where).doc_id))
                starts.append(line.offset)
                if line.offset - reported >= _REPORT_BYTES:
                    advance(line.offset - reported)
                    reported = line.offset
        if not starts:
            raise DataError(f"{self.path}: no documents; give one document a line")
        offsets = Offsets(hashes, starts)
        if offsets.repeated:
            self._refuse_repeated(offsets.repeated)
        return offsets

    def _refuse_repeated(self, hashes: Container[int]) -> None:
        """Name the first id that occurs twice."""
        seen: set[str] = set()
        for line in read_lines(self.path):
            doc_id = self._parse(line.text, line.where).doc_id
            if doc_id in seen:
                raise DataError(f"{line.where}: document id {doc_id!r} occurs twice; keep one of the lines")
            if _hash(doc_id) in hashes:
                seen.add(doc_id)
        raise DataError(f"{self.path}: the ids {sorted(seen)} have one hash; give one of the documents another id")

    @cached_property
    def sha256(self) -> str:
        """Return the sha256 of the file's bytes."""
        return file_sha256(self.path)

    def documents(self) -> Iterator[Document]:
        """Stream the documents; the whole file is checked before the first one comes."""
        _ = self.offsets
        for line in read_lines(self.path):
            yield self._parse(line.text, line.where)

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the content of each id, in the order given; reads the disk in the order of the file.

        Raises:
            DataError: an id is not in the corpus.
        """
        texts = dict.fromkeys(doc_ids, "")
        starts: dict[str, int] = {}
        for doc_id in texts:
            start = self.offsets.find(doc_id)
            if start is None:
                unknown_document(doc_id, str(self.path))
            starts[doc_id] = start
        with self.path.open("rb") as file:
            for doc_id, start in sorted(starts.items(), key=lambda item: item[1]):
                file.seek(start)
                where = f"{self.path} at byte {start}"
                document = self._parse(_decode(file.readline(), where), where)
                if document.doc_id != doc_id:
                    unknown_document(doc_id, str(self.path))
                texts[doc_id] = document.content
        return texts


def unknown_document(doc_id: str, where: str) -> NoReturn:
    """Refuse an id that the corpus does not have."""
    raise DataError(f"{where}: no document {doc_id!r}; the run, qrels or index was made for another corpus")


class Judgement(NamedTuple):
    """One row of a qrels file and where it stands."""

    where: str
    query_id: str
    doc_id: str
    grade: str


def parse_json(text: str, where: str, remedy: str) -> Any:
    """Return a line's JSON value.

    Args:
        text: The line.
        where: Its file and number.
        remedy: What to do if it has none.

    Raises:
        DataError: the line is no JSON, or has more digits or levels than Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"malformed JSON ({error.msg})"
    except ValueError:
        problem = "a number has too many digits without quotes"
    except RecursionError:
        problem = "nested too deep"
    raise DataError(f"{where}: {problem}; {remedy}")


def collect_qrels(source: str, rows: Iterable[Judgement], queries: Container[str], documents: Container[str]) -> Qrels:
    """Check the rows of a qrels file against the ids there are, and group them by query.

    Args:
        source: The file, for messages.
        rows: Its rows.
        queries: Ids of all queries.
        documents: Ids of all documents.

    Raises:
        DataError: a grade that is not an integer or above :data:`HIGHEST_GRADE`, an unknown query or document, a pair
            judged twice, or no row at all; names file and line.
    """
    qrels: dict[str, dict[str, int]] = {}
    for where, query_id, doc_id, grade in rows:
        if _INTEGER.fullmatch(grade) is None:
            raise DataError(f"{where}: grade {grade!r} is not an integer; write 0, 1, 2, ...")
        if len(grade) > _LONGEST_GRADE or int(grade) > HIGHEST_GRADE:
            raise DataError(f"{where}: grade {reprlib.repr(grade)} is not in ..{HIGHEST_GRADE:,}; write 0, 1, 2, ...")
        if query_id not in queries:
            raise DataError(f"{where}: query {query_id!r} has no text; add it to the queries or drop the row")
        if doc_id not in documents:
            raise DataError(f"{where}: document {doc_id!r} is not in the corpus; add it or drop the row")
        judged = qrels.setdefault(query_id, {})
        if doc_id in judged:
            raise DataError(f"{where}: query {query_id!r} judges document {doc_id!r} twice; keep one row")
        judged[doc_id] = int(grade)
    if not qrels:
        raise DataError(f"{source}: no judgements; a split needs at least one row")
    return qrels


def require_split(name: str, split: str, splits: Sequence[str]) -> None:
    """Refuse a split that the collection does not judge.

    Raises:
        DataError: names the splits there are.
    """
    if split not in splits:
        raise DataError(f"{name}: no split {split!r}; it has {', '.join(splits) or 'none'}")


def in_split_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Return train, dev, test, then the other splits by name."""
    return tuple(sorted(splits, key=lambda split: (_SPLIT_ORDER.get(split, len(_SPLIT_ORDER)), split)))
