"""A folder of MS MARCO's files, passages or documents, under the names they are published by.

Passages are ``collection.tsv``, ``queries.SPLIT.tsv``, ``qrels.SPLIT.tsv``; documents ``msmarco-docs.tsv`` and
``msmarco-docdev-{queries,qrels}.tsv``. TREC's Deep Learning tracks add ``msmarco-test2019-queries.tsv`` and
``2019qrels-pass.txt`` or ``2019qrels-docs.txt``, which are the split ``dl19``; those of 2020 are ``dl20``.
File formats: https://microsoft.github.io/msmarco/Datasets and https://microsoft.github.io/msmarco/TREC-Deep-Learning-2019.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from retrieval_kd.artifacts import file_sha256, fingerprint
from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.collections.files import (
    CorpusFile,
    Judgement,
    Line,
    checked_id,
    collect_qrels,
    in_split_order,
    read_lines,
    require_split,
)
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Ranking, rank, read_trec

CORPUS = "collection.tsv"
DOCUMENTS = "msmarco-docs.tsv"
CORPORA = (CORPUS, DOCUMENTS)
TREC_DL_SPLITS = ("dl19", "dl20")
_TREC_DL = re.compile(r"irds:(msmarco-[^/]+/trec-dl-|beir/msmarco(/test)?$)")
_RUN_COLUMNS = (2, 3, 4)
_TREC_COLUMNS = 6
_QUERIES = (
    "msmarco-test2019-queries.tsv",
    "msmarco-test2020-queries.tsv",
    "msmarco-doctrain-queries.tsv",
    "msmarco-docdev-queries.tsv",
)
_QRELS = {
    "2019qrels-pass.txt": "dl19",
    "2020qrels-pass.txt": "dl20",
    "2019qrels-docs.txt": "dl19",
    "2020qrels-docs.txt": "dl20",
    "msmarco-doctrain-qrels.tsv": "train",
    "msmarco-docdev-qrels.tsv": "dev",
}


class MsMarcoCollection:
    """A collection in MS MARCO layout; each file is read when it is first needed.

    A query may stand in several ``queries.SPLIT.tsv`` (``dev`` and ``dev.small`` overlap) if its text is
    the same; queries without judgements (``eval``) are texts that no split uses.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Raises:
            DataError: one of the layout's files is missing.
        """
        corpus = next((folder / name for name in CORPORA if (folder / name).is_file()), None)
        self._folder = folder
        self._query_paths = sorted([*folder.glob("queries.*.tsv"), *_present(folder, _QUERIES)])
        self._qrels_paths = {
            path.name.removeprefix("qrels.").removesuffix(".tsv"): path for path in folder.glob("qrels.*.tsv")
        } | {_QRELS[path.name]: path for path in _present(folder, _QRELS)}
        found = {CORPUS: corpus, "queries.*.tsv": self._query_paths, "qrels.*.tsv": self._qrels_paths}
        for pattern, there in found.items():
            if not there:
                raise DataError(
                    f"{folder / pattern}: missing; MS MARCO layout has {CORPUS}, queries.SPLIT.tsv and "
                    "qrels.SPLIT.tsv, or MS MARCO's documents and TREC's files under their published names"
                )
        assert corpus is not None
        self._corpus = CorpusFile(corpus, _passage if corpus.name == CORPUS else _document)
        self._qrels: dict[str, Qrels] = {}

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self._folder.resolve().name

    @property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 of the collection file."""
        return self._corpus.sha256

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over the sha256 of collection, queries and qrels files."""
        tables = (*self._query_paths, *self._qrels_paths.values())
        return fingerprint(
            {"corpus": self.corpus_fingerprint, "tables": {path.name: file_sha256(path) for path in tables}}
        )

    def documents(self) -> Iterator[Document]:
        """Stream the passages or documents in the order of the file."""
        return self._corpus.documents()

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the passage of each id; an unknown id is a :class:`DataError`."""
        return self._corpus.contents(doc_ids)

    def queries(self) -> Mapping[str, str]:
        """Return query id to text, all files together.

        Raises:
            DataError: malformed line, an id with two texts, or an empty text; names file and line.
        """
        return self._queries

    def splits(self) -> tuple[str, ...]:
        """Return SPLIT of each ``qrels.SPLIT.tsv``, and the splits of the files with names of their own."""
        return in_split_order(self._qrels_paths)

    def qrels(self, split: str) -> Qrels:
        """Return the judgements of a split.

        Raises:
            DataError: the split does not exist, or a row is wrong; names file and line.
        """
        require_split(self.name, split, self.splits())
        if split not in self._qrels:
            path = self._qrels_paths[split]
            self._qrels[split] = collect_qrels(str(path), _judgements(path), self._queries, self._corpus.offsets)
        return self._qrels[split]

    @cached_property
    def _queries(self) -> dict[str, str]:
        queries: dict[str, str] = {}
        for path in self._query_paths:
            of_file: set[str] = set()
            for line in read_lines(path):
                query_id, text = _columns(line, 2, "query-id text")
                checked_id(query_id, line.where, "query")
                if query_id in of_file:
                    raise DataError(f"{line.where}: query id {query_id!r} occurs twice; keep one of the lines")
                if not text.strip():
                    raise DataError(f"{line.where}: query {query_id!r} has an empty text; drop it and its judgements")
                if queries.setdefault(query_id, text) != text:
                    raise DataError(f"{line.where}: query {query_id!r} has another text in another queries file")
                of_file.add(query_id)
        return queries


def usual_measures(collection: str, split: str) -> tuple[str, ...]:
    """Return what is reported on a set of MS MARCO: a folder, or ``irds:`` and an id.

    TREC's Deep Learning tracks judge in grades. Measures that know relevant and not relevant count a passage from
    grade 2 and a document from grade 1, see the tracks' overviews (arXiv 2003.07820).
    """
    if not (split in TREC_DL_SPLITS or (split == "test" and _TREC_DL.match(collection))):
        return ("RR@10", "R@1000")
    if _is_of_documents(collection):
        return ("nDCG@10", "RR", "R@1000")
    return ("nDCG@10", "RR(rel=2)", "R(rel=2)@1000")


def is_msmarco_run(path: Path) -> bool:
    """Tell whether a file's first line has the columns of :func:`read_top1000`; what cannot be read has not."""
    first = next(read_lines(path), None) if path.is_file() else None
    return first is not None and len(first.text.split("\t")) in _RUN_COLUMNS


def read_run(path: Path) -> dict[str, Ranking]:
    """Read a TREC run, or one of MS MARCO's formats; the first line's columns decide.

    Raises:
        DataError: see :func:`retrieval_kd.runs.read_trec` and :func:`read_top1000`.
    """
    if is_msmarco_run(path):
        return read_top1000(path)
    first = next(read_lines(path), None) if path.is_file() else None
    if first is not None and len(first.text.split()) != _TREC_COLUMNS:
        raise DataError(
            f"{first.where}: neither the 6 columns of a TREC run (query Q0 document rank score tag) nor, between tabs, "
            "the 3 of MS MARCO's (query document rank) or the 2 or 4 of a top1000 file"
        )
    return read_trec(path)


def read_top1000(path: Path) -> dict[str, Ranking]:
    """Read a ``top1000`` file or an MS MARCO run as a first stage's run.

    Two columns are ``query-id passage-id`` and four are ``query-id passage-id query passage``, both in
    the order of the file; three are ``query-id passage-id rank``. The file has no scores, so a
    document's score is one over its place.

    Args:
        path: The file, columns between tabs.

    Raises:
        DataError: another number of columns, a rank that is not a positive integer, or a pair that
            occurs twice; names file and line.
    """
    places: dict[str, dict[str, int]] = {}
    for line in read_lines(path):
        columns = line.text.split("\t")
        if len(columns) not in _RUN_COLUMNS:
            raise DataError(
                f"{line.where}: {len(columns)} columns; give query-id passage-id, a third with the rank, or the four "
                "of a top1000 file, between tabs"
            )
        query_id = checked_id(columns[0], line.where, "query")
        doc_id = checked_id(columns[1], line.where, "document")
        of_query = places.setdefault(query_id, {})
        if doc_id in of_query:
            raise DataError(f"{line.where}: query {query_id!r} lists document {doc_id!r} twice; keep one line")
        of_query[doc_id] = _rank(columns[2], line.where) if len(columns) == 3 else len(of_query) + 1
    return {
        query_id: rank(list(of_query), [1.0 / place for place in of_query.values()])
        for query_id, of_query in places.items()
    }


def _is_of_documents(collection: str) -> bool:
    folder = Path(collection)
    return collection.startswith("irds:msmarco-document") or (
        (folder / DOCUMENTS).is_file() and not (folder / CORPUS).is_file()
    )


def _rank(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise DataError(f"{where}: rank {text!r} is not a positive integer; the third column is the rank")
    return int(text)


def _present(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _document(text: str, where: str) -> Document:
    columns = text.split("\t")
    if len(columns) != 4:
        raise DataError(f"{where}: {len(columns)} columns instead of 4: document-id url title body, between tabs")
    return Document(checked_id(columns[0], where, "document"), columns[2], columns[3])


def _passage(text: str, where: str) -> Document:
    doc_id, separator, body = text.partition("\t")
    if not separator:
        raise DataError(f"{where}: no tab; a line is passage-id, tab, text")
    return Document(checked_id(doc_id, where, "document"), "", body)


def _columns(line: Line, count: int, names: str) -> list[str]:
    columns = line.text.split("\t")
    if len(columns) != count:
        raise DataError(f"{line.where}: {len(columns)} columns instead of {count}: {names}, between tabs")
    return columns


def _judgements(path: Path) -> Iterator[Judgement]:
    for line in read_lines(path):
        # Published qrels use tabs (train, dev) or spaces (TREC); ids have neither.
        columns = line.text.split()
        if len(columns) != 4:
            raise DataError(f"{line.where}: {len(columns)} columns, TREC qrels have 4: query-id 0 passage-id grade")
        yield Judgement(line.where, columns[0], columns[2], columns[3])
