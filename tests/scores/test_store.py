"""The score store: what goes in comes out, and whatever is wrong names the pair."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_kd.artifacts import Artifact, Spec, build
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.scores.store import SCHEMA, STAGE, ScoreSource, ScoreStore, write_shard


@dataclass(frozen=True)
class Candidates:
    """What the store needs of a candidate list."""

    query_id: str
    doc_ids: tuple[str, ...]
    labels: tuple[int, ...] = ()


def make(folder: Path, shards: list[list[tuple[str, str, float]]]) -> Artifact:
    """Write a store of shards, each a list of (query id, document id, score)."""

    def work(target: Path) -> dict[str, Any]:
        for number, rows in enumerate(shards):
            write_shard(target, number, [row[:2] for row in rows], np.array([row[2] for row in rows], np.float32))
        return {}

    return build(folder, Spec(STAGE, ScoreSource("t", "r").config()), work)


def test_scores_come_back_aligned_and_exact(tmp_path: Path) -> None:
    """A score given to the neighbouring document is the one error no measure would point at."""
    scores = np.random.default_rng([3]).normal(size=(7, 5)).astype(np.float32)
    rows = [(f"q{i}", f"d{j}", scores[i, j]) for i in range(7) for j in range(5)]
    make(tmp_path / "s", [rows[:11], rows[11:12], rows[12:]])
    store = ScoreStore.open(tmp_path / "s")
    assert len(store) == 35
    draw = np.random.default_rng([4])
    orders = [draw.permutation(5)[: i + 1] for i in range(5)]
    got = store.score_lists([Candidates(f"q{i}", tuple(f"d{j}" for j in order)) for i, order in enumerate(orders)])
    for i, order in enumerate(orders):
        assert got[i].dtype == np.float32
        assert got[i].tolist() == scores[i, order].tolist()


def test_ids_are_text_not_numbers(tmp_path: Path) -> None:
    """Ids such as 007, NaN and an empty-looking one must not be parsed into numbers or nulls."""
    rows = [("007", "7", 1.0), ("7", "007", 2.0), ("NaN", "null", 3.0), ("a\tb", "ü 😀", 4.0)]
    make(tmp_path / "s", [rows])
    got = ScoreStore.open(tmp_path / "s").score_lists([Candidates(q, (d,)) for q, d, _ in rows])
    assert [float(scores[0]) for scores in got] == [1.0, 2.0, 3.0, 4.0]


def test_folder_names_do_not_become_columns(tmp_path: Path) -> None:
    """Arrow reads a folder called lr=1 as a column of a data set."""
    make(tmp_path / "lr=1" / "s", [[("q", "d", 1.0)]])
    assert len(ScoreStore.open(tmp_path / "lr=1" / "s")) == 1


def test_missing_pairs_are_counted_and_named(tmp_path: Path) -> None:
    """A missing score read as 0 would rank an unseen document above half of the seen ones."""
    make(tmp_path / "s", [[("q1", "d1", 1.0), ("q2", "d2", 2.0)]])
    lists = [Candidates("q1", ("d1", "d2", "dx")), Candidates("qx", ("d1", "d2")), Candidates("q2", ("d2",))]
    with pytest.raises(DataError, match=r"4 of 6 pairs") as error:
        ScoreStore.open(tmp_path / "s").score_lists(lists)
    assert "(query 'q1' document 'd2', query 'q1' document 'dx', query 'qx' document 'd1', ...)" in str(error.value)


def test_an_empty_store_misses_everything(tmp_path: Path) -> None:
    """A store of no shard must fail by name and not by index."""
    make(tmp_path / "s", [])
    with pytest.raises(DataError, match="1 of 1 pairs"):
        ScoreStore.open(tmp_path / "s").score_lists([Candidates("q", ("d",))])


def test_duplicate_pairs_name_the_second_shard(tmp_path: Path) -> None:
    """Two scores of one pair mean two teachers in one folder; taking either would be a guess."""
    make(tmp_path / "s", [[("q", "a", 1.0), ("q", "b", 1.0)], [("p", "a", 1.0), ("q", "b", 1.0)]])
    with pytest.raises(DataError, match=r"scores-00001.parquet: query 'q' and document 'b' have a second score"):
        ScoreStore.open(tmp_path / "s")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_when_written(tmp_path: Path, bad: float) -> None:
    """A NaN target turns the student's weights into NaN in one step, an hour after it was written."""
    with pytest.raises(DataError, match=rf"scores-00000.parquet: query 'q' and document 'b' have the score {bad}"):
        make(tmp_path / "s", [[("q", "a", 1.0), ("q", "b", bad)]])
    assert list((tmp_path / "s").glob("*.parquet")) == []
    with pytest.raises(ArtifactError, match=r"no manifest.json"):
        ScoreStore.open(tmp_path / "s")


def _foreign(folder: Path, table: pa.Table) -> Path:
    def work(target: Path) -> dict[str, Any]:
        pq.write_table(table, target / "scores-00000.parquet")
        return {}

    build(folder, Spec(STAGE, {}), work)
    return folder


def test_foreign_files_are_checked_when_read(tmp_path: Path) -> None:
    """A file some other tool wrote may hold NaN, nulls or float64 scores that our writer never would."""
    rows = pa.table([["q"], ["d"], np.array([np.nan], np.float32)], schema=SCHEMA)
    with pytest.raises(DataError, match="have the score nan"):
        ScoreStore.open(_foreign(tmp_path / "nan", rows))
    with pytest.raises(DataError, match=r"columns \['qid', 'score'\]"):
        ScoreStore.open(_foreign(tmp_path / "columns", pa.table({"qid": ["q"], "score": [1.0]})))
    nullable = pa.schema([(name, SCHEMA.field(name).type) for name in SCHEMA.names])
    with pytest.raises(DataError, match="score again"):
        ScoreStore.open(_foreign(tmp_path / "null", pa.table([["q"], [None], [1.0]], schema=nullable)))


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    """The size still fits and Parquet has no checksum by default, so only the hash can tell."""
    make(tmp_path / "s", [[("q", "d", 1.0)]])
    shard = tmp_path / "s" / "scores-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"scores-00000.parquet: bytes differ"):
        ScoreStore.open(tmp_path / "s")


def test_the_lists_of_a_store_are_its_pairs(tmp_path: Path) -> None:
    """A report over lists cut at the wrong place would speak of rankings that nobody made."""
    rows = [("q2", "a", 1.0), ("q1", "b", 2.0), ("q2", "c", 3.0), ("q1", "a", 4.0), ("q3", "c", 5.0)]
    make(tmp_path / "s", [rows[:2], rows[2:]])
    lists = {
        (item.query_id, doc_id): float(score)
        for item, scores in ScoreStore.open(tmp_path / "s").lists()
        for doc_id, score in zip(item.doc_ids, scores, strict=True)
    }
    assert lists == {row[:2]: row[2] for row in rows}
    assert [item.query_id for item, _ in ScoreStore.open(tmp_path / "s").lists()] == ["q2", "q1", "q3"]
    make(tmp_path / "empty", [])
    assert list(ScoreStore.open(tmp_path / "empty").lists()) == []
