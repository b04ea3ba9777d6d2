"""A folder in BEIR layout: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``.

The layout is that of the BEIR benchmark (https://github.com/beir-cellar/beir, "Load your custom dataset").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from retrieval_kd.artifacts import atomic_write, file_sha256, fingerprint
from retrieval_kd.collections.base import Collection, Document, Qrels
from retrieval_kd.collections.files import (
    CorpusFile,
    Judgement,
    checked_id,
    collect_qrels,
    in_split_order,
    parse_json,
    read_lines,
    require_split,
)
from retrieval_kd.errors import DataError

CORPUS = "corpus.jsonl"
QUERIES = "queries.jsonl"
QRELS = "qrels"
_OWN_KEYS = ("_id", "title", "text")
_HEADER = ["query-id", "corpus-id", "score"]


class BeirCollection:
    """A collection in BEIR layout; each file is read when it is first needed."""

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Raises:
            DataError: one of the layout's files is missing.
        """
        for needed in (folder / CORPUS, folder / QUERIES, folder / QRELS):
            if not needed.exists():
                raise DataError(
                    f"{needed}: missing; BEIR layout has {CORPUS}, {QUERIES} and {QRELS}/SPLIT.tsv, unpacked"
                )
        self._folder = folder
        self._corpus = CorpusFile(folder / CORPUS, _document)
        self._qrels: dict[str, Qrels] = {}

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self._folder.resolve().name

    @property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 of the corpus file."""
        return self._corpus.sha256

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over the sha256 of corpus, queries and each qrels file."""
        return fingerprint(
            {
                "corpus": self.corpus_fingerprint,
                "queries": file_sha256(self._folder / QUERIES),
                "qrels": {split: file_sha256(self._qrels_path(split)) for split in self.splits()},
            }
        )

    def documents(self) -> Iterator[Document]:
        """Stream the documents in the order of the file."""
        return self._corpus.documents()

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the content of each id; an unknown id is a :class:`DataError`."""
        return self._corpus.contents(doc_ids)

    def queries(self) -> Mapping[str, str]:
        """Return query id to text, all splits together.

        Raises:
            DataError: malformed line, id twice, or an empty text; names file and line.
        """
        return self._queries

    def splits(self) -> tuple[str, ...]:
        """Return the stems of the files in ``qrels``."""
        return in_split_order(path.stem for path in (self._folder / QRELS).glob("*.tsv"))

    def qrels(self, split: str) -> Qrels:
        """Return the judgements of a split.

        Raises:
            DataError: the split does not exist, the header is missing, or a row is wrong; names file and line.
        """
        require_split(self.name, split, self.splits())
        if split not in self._qrels:
            path = self._qrels_path(split)
            self._qrels[split] = collect_qrels(str(path), _judgements(path), self._queries, self._corpus.offsets)
        return self._qrels[split]

    @cached_property
    def _queries(self) -> dict[str, str]:
        queries: dict[str, str] = {}
        for line in read_lines(self._folder / QUERIES):
            row = _record(line.text, line.where)
            query_id = checked_id(_string(row, "_id", line.where), line.where, "query")
            text = _string(row, "text", line.where)
            if query_id in queries:
                raise DataError(f"{line.where}: query id {query_id!r} occurs twice; keep one of the lines")
            if not text.strip():
                raise DataError(f"{line.where}: query {query_id!r} has an empty text; drop it and its judgements")
            queries[query_id] = text
        return queries

    def _qrels_path(self, split: str) -> Path:
        return self._folder / QRELS / f"{split}.tsv"


def write_beir(collection: Collection, folder: Path) -> None:
    """Write any collection in BEIR layout; the judgements come last."""
    with atomic_write(folder / CORPUS) as file:
        for document in collection.documents():
            own = {"_id": document.doc_id, "title": document.title, "text": document.text}
            file.write(_line({**document.metadata, **own}))
    with atomic_write(folder / QUERIES) as file:
        for query_id, text in collection.queries().items():
            file.write(_line({"_id": query_id, "text": text}))
    for split in collection.splits():
        with atomic_write(folder / QRELS / f"{split}.tsv") as file:
            file.write("\t".join(_HEADER) + "\n")
            for query_id, grades in collection.qrels(split).items():
                file.writelines(f"{query_id}\t{doc_id}\t{grade}\n" for doc_id, grade in grades.items())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _document(text: str, where: str) -> Document:
    row = _record(text, where)
    doc_id = checked_id(_string(row, "_id", where), where, "document")
    title = _string(row, "title", where) if row.get("title") is not None else ""
    return Document(doc_id, title, _string(row, "text", where), _metadata(row, where))


def _metadata(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys that are not the layout's own; those of its ``metadata`` object stand beside them."""
    extra = {key: value for key, value in row.items() if key not in (*_OWN_KEYS, "metadata")}
    nested = row.get("metadata") or {}
    if not isinstance(nested, dict):
        raise DataError(f"{where}: 'metadata' is {nested!r}, not an object; give it keys and values")
    return {**nested, **extra}


def _record(text: str, where: str) -> dict[str, Any]:
    row = parse_json(text, where, "write one object a line, or fetch the file again")
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} instead of a JSON object; write one object a line")
    return row


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DataError(f"{where}: no {key!r}; every line needs it")
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {value!r}, not a string; put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can escape half of a surrogate pair, which no tokenizer and no file takes.
        raise DataError(f"{where}: {key!r} is not valid Unicode; mend its \\u escapes") from None
    return value


def _judgements(path: Path) -> Iterator[Judgement]:
    header_seen = False
    for line in read_lines(path):
        columns = line.text.split("\t")
        if not header_seen:
            if columns != _HEADER:
                raise DataError(f"{line.where}: no header; the first line is {' '.join(_HEADER)}, between tabs")
            header_seen = True
            continue
        if len(columns) != len(_HEADER):
            raise DataError(f"{line.where}: {len(columns)} columns, qrels have 3 between tabs: {' '.join(_HEADER)}")
        yield Judgement(line.where, *columns)
