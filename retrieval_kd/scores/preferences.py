"""A pairwise teacher's preferences on disk, and from preferences to the scores of a list.

A preference is a probability, 0..1, never its logarithm: a file of log-probabilities read as probabilities would teach
that nothing is preferred to anything. Both orders of a pair are kept as the model gave them, because a model that
prefers what it reads first can be told from one that does not only while they are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_kd.errors import DataError
from retrieval_kd.runs import Scores, Shortlist
from retrieval_kd.scores.store import encode_ids, read_shards, write_table

STAGE = "compare"
Triple = tuple[str, str, str]
"""A query id and the ids of two documents, in the order in which the model read them."""
Preferences = npt.NDArray[np.float32]
"""``[documents, documents]``: entry (i, j) is the probability that i is more relevant than j; NaN where unknown."""
Aggregation = Literal["mean", "bradley_terry", "copeland"]

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_i", pa.string(), nullable=False),
        pa.field("doc_j", pa.string(), nullable=False),
        pa.field("p", pa.float32(), nullable=False),
    ]
)
# Precision of the normal prior on strengths: without one, a document that wins all the time has an infinite one.
_PRIOR = 1e-3
_NEWTON_STEPS = 100
_CONVERGED = 1e-10


class PreferenceStore:
    """Preferences by (query, first, second), in memory at 12 bytes each plus the distinct ids.

    Attributes:
        path: The folder they were read from.
        fingerprint: Identity of the preferences.
    """

    def __init__(self, path: Path, fingerprint: str, table: pa.Table, where: Callable[[int], str]) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.fingerprint = fingerprint
        values = table["p"].to_numpy()
        _require_probabilities(table, values, where)
        queries, query_ids = encode_ids(table["query_id"])
        documents, doc_ids = encode_ids(pa.chunked_array([*table["doc_i"].chunks, *table["doc_j"].chunks], pa.string()))
        self._query_code = {query_id: code for code, query_id in enumerate(query_ids)}
        self._doc_code = {doc_id: code for code, doc_id in enumerate(doc_ids)}
        firsts, seconds = documents[: len(table)], documents[len(table) :]
        # Query and first document become one number, counted densely, so that the key of a triple fits 64 bits.
        pairs = queries * max(1, len(doc_ids)) + firsts
        self._pairs, dense = np.unique(pairs, return_inverse=True)
        keys = dense * max(1, len(doc_ids)) + seconds
        order = np.argsort(keys, kind="stable")
        self._keys, self._values = keys[order], values[order]
        repeated = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(repeated):
            row = int(order[repeated[0] + 1])
            raise DataError(f"{where(row)}: {_named(table, row)} have a second preference; keep one of them")

    def __len__(self) -> int:
        """Return the number of comparisons."""
        return len(self._keys)

    @classmethod
    def open(cls, folder: Path) -> PreferenceStore:
        """Read a finished store and check every file's hash and every preference.

        Raises:
            ArtifactError: the folder is not a whole store.
            DataError: a preference is no probability or occurs twice; names query, documents and file.
        """
        return cls(folder, *read_shards(folder, STAGE, SCHEMA))

    def find(self, lists: Sequence[Shortlist]) -> list[Preferences]:
        """Return each list's preferences as the model gave them, NaN where it was not asked."""
        out = []
        width = max(1, len(self._doc_code))
        for item in lists:
            query = self._query_code.get(item.query_id, -1)
            documents = np.array([self._doc_code.get(doc_id, -1) for doc_id in item.doc_ids], dtype=np.int64)
            pairs, first_known = _search(
                self._pairs, np.where((documents >= 0) & (query >= 0), query * width + documents, -1)
            )
            asked = first_known[:, None] & (documents >= 0)[None, :]
            rows, known = _search(self._keys, np.where(asked, pairs[:, None] * width + documents[None, :], -1))
            values = np.full((len(documents), len(documents)), np.nan, dtype=np.float32)
            values[known] = self._values[rows[known]]
            out.append(values)
        return out


def _search(
    keys: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return where each wanted key stands among sorted keys, and whether it does."""
    rows = np.searchsorted(keys, wanted)
    known = (rows < len(keys)) & (wanted >= 0)
    known[known] = keys[rows[known]] == wanted[known]
    return rows, known


def write_preferences(folder: Path, number: int, triples: Sequence[Triple], preferences: Scores) -> None:
    """Write one shard, ``preferences-00000.parquet`` and so on, whole or not at all.

    Raises:
        DataError: a value is no probability; names query, documents and file.
    """
    path = preferences_path(folder, number)
    values = np.asarray(preferences, dtype=np.float32)
    columns = [pa.array([triple[i] for triple in triples], pa.string()) for i in range(3)]
    table = pa.table([*columns, pa.array(values)], schema=SCHEMA)
    _require_probabilities(table, values, lambda _: str(path))
    write_table(path, table)


def preferences_path(folder: Path, number: int) -> Path:
    """Return where shard ``number`` lies."""
    return folder / f"preferences-{number:05d}.parquet"


def _require_probabilities(table: pa.Table, values: Scores, where: Callable[[int], str]) -> None:
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{where(row)}: {_named(table, row)} have the preference {values[row]}; give the probability, 0..1, that "
            "the first is more relevant, not its logarithm or a logit"
        )


def _named(table: pa.Table, row: int) -> str:
    query_id, first, second = (table[name][row].as_py() for name in SCHEMA.names[:3])
    return f"query {query_id!r}, documents {first!r} and {second!r}"


def symmetrised(preferences: Preferences) -> Preferences:
    """Return preferences that do not depend on the order of reading: the mean of P(i > j) and 1 - P(j > i).

    Where only one order is known it decides alone; the diagonal and pairs of which neither is known are NaN.

    Args:
        preferences: float32 ``[L, L]`` as the model gave them.
    """
    both = np.stack([preferences, 1 - preferences.T])
    known = ~np.isnan(both)
    total = np.where(known, both, 0).sum(axis=0)
    out = np.where(known.any(axis=0), total / np.maximum(1, known.sum(axis=0)), np.nan)
    np.fill_diagonal(out, np.nan)
    return out.astype(np.float32)


def aggregated(preferences: Preferences, how: Aggregation) -> Scores:
    """Return one score for each document of a list from its symmetrised preferences.

    ``mean`` is the mean probability of being preferred, over the documents it was compared with (0.5 with none);
    PRP's all-pairs sum (arXiv 2306.17563) over its number. ``copeland`` counts wins less losses over the number of
    comparisons, -1..1, a probability of exactly one half being neither. ``bradley_terry`` is the strength ``b`` that
    makes the preferences most likely under ``P(i > j) = sigmoid(b_i - b_j)``, with mean zero, a scale of logits, and
    a normal prior of precision 0.001 that keeps undefeated documents finite.

    Args:
        preferences: float32 ``[L, L]`` from :func:`symmetrised`.
        how: The aggregation.

    Returns:
        float32 ``[L]``.
    """
    values = preferences.astype(np.float64)
    known = ~np.isnan(values)
    compared = np.maximum(1, known.sum(axis=1))
    if how == "mean":
        total = np.where(known, values, 0).sum(axis=1)
        out = np.where(known.any(axis=1), total / compared, 0.5)
    elif how == "copeland":
        out = np.where(known, np.sign(values - 0.5), 0).sum(axis=1) / compared
    else:
        out = _strengths(np.where(known, values, 0), known)
    return out.astype(np.float32)


def _strengths(wins: npt.NDArray[np.float64], known: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Maximise the Bradley-Terry likelihood by Newton's method; it is strictly concave with its prior."""
    strengths = np.zeros(len(wins))
    for _ in range(_NEWTON_STEPS):
        expected = 0.5 + 0.5 * np.tanh((strengths[:, None] - strengths[None, :]) / 2)
        gradient = np.where(known, wins - expected, 0).sum(axis=1) - _PRIOR * strengths
        if np.abs(gradient).max(initial=0) < _CONVERGED:
            break
        weights = np.where(known, expected * (1 - expected), 0)
        hessian = np.diag(weights.sum(axis=1) + _PRIOR) - weights
        strengths = strengths + np.linalg.solve(hessian, gradient)
    return strengths
