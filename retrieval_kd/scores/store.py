"""Teacher scores on disk: Parquet shards of (query_id, doc_id, score) and a manifest that says whose they are.

Scores are the teacher's raw logits in float32; temperature and normalisation belong to the reader
(:mod:`retrieval_kd.scores.normalise`). Texts are never stored: a score without the ids of a known
collection would be worth nothing, and a copy of the texts could disagree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_kd.artifacts import Artifact, atomic_write
from retrieval_kd.errors import DataError
from retrieval_kd.runs import Scores, Shortlist

STAGE = "score"
PAIRS_PER_SHARD = 4096
Pair = tuple[str, str]
"""A query id and a document id."""

SCHEMA = pa.schema(
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
        revision: sha256 of the model's weights.
        template: How query and document became the ranker's input; empty when unknown.
        max_length: Longest pair in tokens; 0 when unknown.
        reading: What of the ranker's output is stored: ``logit``; ``logit_difference``, of two labels the second's
            minus the first's; ``maxsim``, the sum over the query's tokens of their best similarity.
    """

    teacher: str
    revision: str
    template: str = ""
    max_length: int = 0
    reading: str = "logit"

    def config(self) -> dict[str, Any]:
        """Return the manifest's configuration."""
        return asdict(self)


class ScoreStore:
    """Raw scores by (query, document), in memory at 12 bytes a pair plus the distinct ids.

    Attributes:
        path: The folder or file they were read from.
        fingerprint: Identity of the scores.
    """

    def __init__(
        self, path: Path, fingerprint: str, table: pa.Table, where: Callable[[int], str], *, finite: bool = True
    ) -> None:
        """Index a table of :data:`SCHEMA`; :meth:`open` and :func:`retrieval_kd.scores.files.read_scores` make one.

        Args:
            path: Where it was read from.
            fingerprint: Identity of the scores.
            table: The pairs.
            where: From a row of the table to the place that an error names.
            finite: Refuse scores that are not; a report on them wants to count them.

        Raises:
            DataError: a score is not finite or a pair occurs twice; names query, document and place.
        """
        self.path = path
        self.fingerprint = fingerprint
        scores = table["score"].to_numpy()
        bad = np.flatnonzero(finite & ~np.isfinite(scores))
        if len(bad):
            raise DataError(_not_finite(where(int(bad[0])), table, int(bad[0])))
        query_codes, self._query_ids = encode_ids(table["query_id"])
        doc_codes, self._doc_ids = encode_ids(table["doc_id"])
        self._query_code = {query_id: code for code, query_id in enumerate(self._query_ids)}
        self._doc_code = {doc_id: code for code, doc_id in enumerate(self._doc_ids)}
        keys = query_codes * max(1, len(self._doc_ids)) + doc_codes
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._scores = scores[order]
        repeated = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(repeated):
            row = int(order[repeated[0] + 1])
            raise DataError(
                f"{where(row)}: query {self._query_ids[query_codes[row]]!r} and document "
                f"{self._doc_ids[doc_codes[row]]!r} have a second score; keep one of them"
            )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._keys)

    @classmethod
    def open(cls, folder: Path, *, finite: bool = True) -> ScoreStore:
        """Read a finished store and check every file's hash and every pair.

        Args:
            folder: Where it lies.
            finite: Refuse scores that are not.

        Raises:
            ArtifactError: the folder is not a whole store.
            DataError: a score is not finite or a pair occurs twice; names query, document and file.
        """
        fingerprint, table, where = read_shards(folder, STAGE, SCHEMA)
        return cls(folder, fingerprint, table, where, finite=finite)

    def lists(self) -> Iterator[tuple[Shortlist, Scores]]:
        """Yield each query's documents with their raw scores."""
        queries = self._keys // max(1, len(self._doc_ids))
        starts = np.flatnonzero(np.diff(queries, prepend=-1))
        for rows in np.split(np.arange(len(self._keys)), starts[1:]) if len(starts) else ():
            documents = self._keys[rows] % len(self._doc_ids)
            query_id = self._query_ids[queries[rows[0]]]
            yield Shortlist(query_id, tuple(self._doc_ids[code] for code in documents)), self._scores[rows]

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
                f"{self.path}: {len(missing)} of {total} pairs have no score ({first}"
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
    values = np.asarray(scores, dtype=np.float32)
    table = pa.table(
        [
            pa.array([query_id for query_id, _ in pairs], pa.string()),
            pa.array([doc_id for _, doc_id in pairs], pa.string()),
            pa.array(values),
        ],
        schema=SCHEMA,
    )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(_not_finite(str(path), table, int(bad[0])))
    write_table(path, table)


def shard_path(folder: Path, number: int) -> Path:
    """Return where shard ``number`` lies."""
    return folder / f"scores-{number:05d}.parquet"


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    with atomic_write(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")


def read_shards(folder: Path, stage: str, schema: pa.Schema) -> tuple[str, pa.Table, Callable[[int], str]]:
    """Read all shards of a finished artifact, each file's hash checked.

    Returns:
        The artifact's fingerprint, the rows, and the file that a row came from.

    Raises:
        ArtifactError: the folder is not a whole artifact of this stage.
        DataError: a shard is of another schema; names the file.
    """
    artifact = Artifact.load(folder, stage)
    artifact.verify()
    paths = [folder / entry.path for entry in artifact.files]
    shards = [read_table(path, schema) for path in paths]
    ends = np.cumsum([len(shard) for shard in shards])
    table = pa.concat_tables(shards) if shards else schema.empty_table()
    return artifact.fingerprint, table, lambda row: str(paths[int(np.searchsorted(ends, row, side="right"))])


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file that one of our stages wrote.

    Raises:
        DataError: not Parquet, or not of this schema.
    """
    try:
        # Not pq.read_table: it would read folder names such as "k=v" as further columns.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}); score the candidates again") from None
    if table.schema.remove_metadata() != schema:
        raise DataError(f"{path}: columns {table.schema.names}, a shard here has {schema.names}; score again")
    return table


def _not_finite(where: str, table: pa.Table, row: int) -> str:
    query_id, doc_id, score = (table[name][row].as_py() for name in SCHEMA.names)
    return f"{where}: query {query_id!r} and document {doc_id!r} have the score {score}; mend the teacher that made it"


def encode_ids(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return each value's code and the distinct values in the order of their codes."""
    encoded = pa.concat_arrays(column.chunks or [pa.array([], column.type)]).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
