"""Teacher scores on disk: Parquet shards of (query_id, doc_id, score) and a manifest that says whose they are.

Scores are the teacher's raw logits in float32; temperature and normalisation belong to the reader
(:mod:`retrieval_kd.scores.normalise`). Texts are never stored: a score without the ids of a known
collection would be worth nothing, and a copy of the texts could disagree with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_kd.artifacts import Artifact, Spec, atomic_write, build
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Run, Scores, Shortlist

STAGE = "score"
PAIRS_PER_SHARD = 4096
Pair = tuple[str, str]
"""A query id and a document id."""

_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ScoreSource:
    """Whose scores a store holds; written into its manifest.

    Attributes:
        teacher: The ranker's name.
        revision: sha256 of what made the scores: a model's weights, or a run's lines.
        template: How query and document became the ranker's input; empty when unknown.
        max_length: Longest pair in tokens; 0 when unknown.
    """

    teacher: str
    revision: str
    template: str = ""
    max_length: int = 0

    def config(self) -> dict[str, Any]:
        """Return the manifest's configuration."""
        return asdict(self)


class ScoreStore:
    """Raw scores by (query, document), in memory at 12 bytes a pair plus the distinct ids."""

    def __init__(self, artifact: Artifact, query_ids: list[str], doc_ids: list[str], table: _Table) -> None:
        """Use :meth:`open`."""
        self.artifact = artifact
        self._query_code = {query_id: code for code, query_id in enumerate(query_ids)}
        self._doc_code = {doc_id: code for code, doc_id in enumerate(doc_ids)}
        self._keys = table.keys
        self._scores = table.scores

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._keys)

    @classmethod
    def open(cls, folder: Path) -> ScoreStore:
        """Read a finished store and check every file's hash and every pair.

        Raises:
            ArtifactError: the folder is not a whole store.
            DataError: a score is not finite or a pair occurs twice; names query, document and file.
        """
        artifact = Artifact.load(folder, STAGE)
        artifact.verify()
        paths = [folder / entry.path for entry in artifact.files]
        shards = [_read_shard(path) for path in paths]
        rows = pa.concat_tables(shards) if shards else _SCHEMA.empty_table()
        query_codes, query_ids = _encode(rows["query_id"])
        doc_codes, doc_ids = _encode(rows["doc_id"])
        keys = query_codes * max(1, len(doc_ids)) + doc_codes
        order = np.argsort(keys, kind="stable")
        table = _Table(keys[order], rows["score"].to_numpy()[order])
        repeated = np.flatnonzero(table.keys[1:] == table.keys[:-1])
        if len(repeated):
            row = int(order[repeated[0] + 1])
            ends = np.cumsum([len(shard) for shard in shards])
            raise DataError(
                f"{paths[int(np.searchsorted(ends, row, side='right'))]}: query {query_ids[query_codes[row]]!r} and "
                f"document {doc_ids[doc_codes[row]]!r} have a second score; keep one of them"
            )
        return cls(artifact, query_ids, doc_ids, table)

    def score_lists(self, lists: Sequence[Shortlist]) -> list[Scores]:
        """Return the raw scores of each list, float32 ``[len(doc_ids)]``, aligned with its ``doc_ids``.

        Raises:
            DataError: pairs have no score; says how many and names the first three.
        """
        out = self.find(lists)
        missing = [
            (candidates.query_id, candidates.doc_ids[i])
            for candidates, scores in zip(lists, out, strict=True)
            for i in np.flatnonzero(np.isnan(scores))
        ]
        if missing:
            total = sum(len(candidates.doc_ids) for candidates in lists)
            first = ", ".join(f"query {query_id!r} document {doc_id!r}" for query_id, doc_id in missing[:3])
            raise DataError(
                f"{self.artifact.path}: {len(missing)} of {total} pairs have no score ({first}"
                f"{', ...' if len(missing) > 3 else ''}); score these candidates with this teacher"
            )
        return out

    def find(self, lists: Sequence[Shortlist]) -> list[Scores]:
        """Return each list's raw scores, NaN where the store has none (it never holds a NaN of its own)."""
        out: list[Scores] = []
        for candidates in lists:
            query = self._query_code.get(candidates.query_id, -1)
            documents = np.array([self._doc_code.get(doc_id, -1) for doc_id in candidates.doc_ids], dtype=np.int64)
            keys = np.where((documents >= 0) & (query >= 0), query * len(self._doc_code) + documents, -1)
            rows = np.searchsorted(self._keys, keys)
            found = (rows < len(self._keys)) & (keys >= 0)
            found[found] = self._keys[rows[found]] == keys[found]
            scores = np.full(len(candidates.doc_ids), np.nan, dtype=np.float32)
            scores[found] = self._scores[rows[found]]
            out.append(scores)
        return out


def write_shard(folder: Path, number: int, pairs: Sequence[Pair], scores: Scores) -> None:
    """Write one shard, ``scores-00000.parquet`` and so on, whole or not at all.

    Raises:
        DataError: a score is not finite; names query, document and file.
    """
    path = shard_path(folder, number)
    table = pa.table(
        [
            pa.array([query_id for query_id, _ in pairs], pa.string()),
            pa.array([doc_id for _, doc_id in pairs], pa.string()),
            pa.array(np.asarray(scores, dtype=np.float32)),
        ],
        schema=_SCHEMA,
    )
    _require_finite(path, table)
    with atomic_write(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")


def shard_path(folder: Path, number: int) -> Path:
    """Return where shard ``number`` lies."""
    return folder / f"scores-{number:05d}.parquet"


def store_from_run(run: Run, folder: Path, teacher: str) -> Artifact:
    """Make a store of a ranked run, so that any system that writes a TREC file is a teacher.

    The scores are the run's own, except that ties were broken by :func:`retrieval_kd.runs.rank` with
    differences of one float32 step.

    Args:
        run: Query id to ranking, as :func:`retrieval_kd.runs.read_trec` returns it.
        folder: Where the store lives.
        teacher: The name of the system that made the run.

    Raises:
        DataError: a score is not finite.
    """
    source = ScoreSource(teacher, _run_revision(run))

    def work(target: Path) -> Mapping[str, Any]:
        rows = _run_rows(run)
        number = 0
        while chunk := list(islice(rows, PAIRS_PER_SHARD)):
            pairs = [(query_id, doc_id) for query_id, doc_id, _ in chunk]
            write_shard(target, number, pairs, np.array([score for *_, score in chunk], dtype=np.float32))
            number += 1
        return {"pairs": sum(len(ranking) for ranking in run.values()), "queries": len(run)}

    return build(folder, Spec(STAGE, source.config()), work)


@dataclass(frozen=True)
class _Table:
    """Pairs as one integer each (query code times documents plus document code), increasing, and their scores."""

    keys: npt.NDArray[np.int64]
    scores: Scores


def _run_rows(run: Run) -> Iterator[tuple[str, str, np.float32]]:
    for query_id, ranking in run.items():
        for doc_id, score in zip(ranking.doc_ids, ranking.scores, strict=True):
            yield query_id, doc_id, score


def _run_revision(run: Run) -> str:
    digest = hashlib.sha256()
    for query_id, doc_id, score in _run_rows(run):
        digest.update(f"{query_id}\t{doc_id}\t{score:.9g}\n".encode())
    return digest.hexdigest()


def _read_shard(path: Path) -> pa.Table:
    try:
        # Not read_table: it would read folder names such as "k=v" as further columns.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}); score the candidates again") from None
    if table.schema.remove_metadata() != _SCHEMA:
        raise DataError(f"{path}: columns {table.schema.names}, a score shard has {_SCHEMA.names}; score again")
    _require_finite(path, table)
    return table


def _require_finite(path: Path, table: pa.Table) -> None:
    scores = table["score"].to_numpy()
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{path}: query {table['query_id'][row].as_py()!r} and document {table['doc_id'][row].as_py()!r} have the "
            f"score {scores[row]}; mend the teacher that made it"
        )


def _encode(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return each value's code and the distinct values in the order of their codes."""
    encoded = pa.concat_arrays(column.chunks or [pa.array([], column.type)]).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
