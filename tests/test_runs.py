"""The one place where ties are broken, and the TREC files around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_kd.errors import DataError
from retrieval_kd.runs import TrecFiles, rank, read_trec, write_trec

_SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.5]), st.floats(-(2.0**100), 2.0**100, width=32)),
    min_size=0,
    max_size=40,
)


def test_ties_are_broken_by_id_ascending() -> None:
    """Without it two tools that sort by score alone would disagree about the same run."""
    ranking = rank(["c", "a", "b"], [1.0, 1.0, 2.0])
    assert ranking.doc_ids == ("b", "a", "c")
    assert ranking.scores[0] == 2.0
    assert ranking.scores[1] == 1.0
    assert ranking.scores[2] == np.nextafter(np.float32(1.0), np.float32(0.0))


def test_a_chain_of_ties_pushes_the_next_score_down_too() -> None:
    """Moving ties down may run into the next real score; that one must move as well."""
    below = float(np.nextafter(np.float32(1.0), np.float32(0.0)))
    ranking = rank(["a", "b", "c", "d"], [1.0, 1.0, 1.0, below])
    assert ranking.doc_ids == ("a", "b", "c", "d")
    assert np.all(np.diff(ranking.scores.astype(np.float64)) < 0)


@given(_SCORES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_ranking_does_not_depend_on_the_order_given(scores: list[float], random: object) -> None:
    """A ranking that depends on the order of its input changes with the hash seed or the block size."""
    ids = [f"d{i}" for i in range(len(scores))]
    shuffled = list(range(len(scores)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one = rank(ids, scores)
    other = rank([ids[i] for i in shuffled], [scores[i] for i in shuffled])
    assert one.doc_ids == other.doc_ids
    assert np.array_equal(one.scores, other.scores)
    assert one.doc_ids == tuple(sorted(ids, key=lambda d: (-np.float32(scores[int(d[1:])]), d)))
    assert np.all(one.scores[1:] < one.scores[:-1])


@given(_SCORES.filter(len))
@settings(deadline=None)
def test_a_written_run_reads_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, scores: list[float]) -> None:
    """Fewer digits would merge neighbouring float32 scores into ties again."""
    path = tmp_path_factory.mktemp("run") / "run.trec"
    ranking = rank([f"d{i}" for i in range(len(scores))], scores)
    write_trec(path, {"q": ranking}, "tag")
    back = read_trec(path)["q"]
    assert back.doc_ids == ranking.doc_ids
    assert np.array_equal(back.scores, ranking.scores)


def test_k_keeps_the_best_and_top_cuts() -> None:
    """Cutting before breaking ties would keep whichever came first."""
    ranking = rank(["b", "a", "c"], [1.0, 1.0, 1.0], k=2)
    assert ranking.doc_ids == ("a", "b")
    assert ranking.top(1).doc_ids == ("a",)
    assert len(ranking.top(9)) == 2
    assert len(rank([], [])) == 0


@pytest.mark.parametrize(
    ("ids", "scores", "part"),
    [
        (["a", "b"], [1.0], "2 document ids but scores of shape (1,)"),
        (["a", "b"], [1.0, float("nan")], "document 'b': score nan is not finite"),
        (["a", "b"], [float("inf"), 1.0], "document 'a': score inf is not finite"),
        (["a", "b"], [1.0, -1e39], "document 'b': score -inf is not finite"),
        (["a", "b", "a"], [1.0, 2.0, 3.0], "document 'a' occurs twice"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_impossible_scores_are_refused(ids: list[str], scores: list[float], part: str) -> None:
    """A NaN sorts anywhere; a document twice counts its gain twice."""
    with pytest.raises(DataError) as error:
        rank(ids, scores)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("q Q0 d 1 0.5\n", ":1: 5 columns, a TREC run has 6"),
        ("q Q0 d 1 0.5 t\n\nq Q0 e 2 high t\n", ":3: score 'high' is not a number"),
        ("q Q0 d 1 nan t\n", ":1: score nan is not finite"),
        ("q Q0 d 1 1e999 t\n", ":1: score 1e999 is not finite (query 'q')"),
        ("q Q0 e 1 3e38 t\nq Q0 d 1 1e39 t\n", ":2: score 1e39 is beyond what a float32 holds (query 'q')"),
        ("q Q0 d 1 -1e39 t\n", ":1: score -1e39 is beyond what a float32 holds (query 'q')"),
        ("q Q0 d 1 0.5 t\nq Q0 d 2 0.4 t\n", ":2: query 'q' lists document 'd' twice"),
        ("q Q0 d 1 0.5 t\nq Q0 e 2 0.", ":2: 5 columns"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_malformed_runs_name_the_line(tmp_path: Path, content: str, part: str) -> None:
    """A line that is skipped in silence changes the measure and nobody knows."""
    path = tmp_path / "run.trec"
    path.write_text(content)
    for read in (read_trec, lambda path: dict(TrecFiles([path]))):
        with pytest.raises(DataError) as error:
            read(path)
        assert str(path) + part in str(error.value)


def test_a_run_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    """Without it a run written in Latin-1 would end in a trace."""
    path = tmp_path / "run.trec"
    path.write_bytes(b"q Q0 d 1 0.5 t\nq Q0 caf\xe9 2 0.4 t\n")
    with pytest.raises(DataError, match=r"run\.trec:2: not UTF-8"):
        read_trec(path)


def test_a_missing_run_is_a_clear_error(tmp_path: Path) -> None:
    """A bare FileNotFoundError would print a trace instead of a remedy."""
    with pytest.raises(DataError, match="cannot read the run"):
        read_trec(tmp_path / "absent.trec")
    with pytest.raises(DataError, match="cannot read the run"):
        TrecFiles([tmp_path / "absent.trec"])


def test_the_largest_scores_are_scores(tmp_path: Path) -> None:
    """A bound too low would refuse the run of a ranker whose only fault is its scale."""
    path = tmp_path / "run.trec"
    path.write_text("q Q0 a 1 3.4028234e38 t\nq Q0 b 2 -3.4028234e38 t\n")
    assert read_trec(path)["q"].doc_ids == ("a", "b")


def test_the_rank_column_does_not_order(tmp_path: Path) -> None:
    """Some tools write ranks from 0 or wrong ones; only the score counts."""
    path = tmp_path / "run.trec"
    path.write_text("q Q0 low 1 0.1 t\nq Q0 high 2 0.9 t\n")
    assert read_trec(path)["q"].doc_ids == ("high", "low")


def test_a_run_on_disk_is_the_run_in_memory(tmp_path: Path) -> None:
    """Without it mining from files would see other ranks than evaluation, most likely where queries take turns."""
    path = tmp_path / "run.trec"
    lines = [f"q{i % 3} Q0 d{i} 0 {(i * 7) % 5} t\n" for i in range(30)]
    path.write_text("\ufeff" + "".join(lines[:12]) + "\n\n" + "".join(sorted(lines[12:])).rstrip("\n"))
    one, many = read_trec(path), TrecFiles([path])
    assert list(one) == list(many) == ["q0", "q1", "q2"]
    assert len(many) == 3
    assert "q1" in many
    assert "d1" not in many
    for query_id, ranking in one.items():
        assert many[query_id].doc_ids == ranking.doc_ids
        assert np.array_equal(many[query_id].scores, ranking.scores)
    with pytest.raises(KeyError):
        many["nobody"]


def test_a_run_in_several_files(tmp_path: Path) -> None:
    """Without it shards could hide a document that a query lists in two of them."""
    one, two = tmp_path / "1.trec", tmp_path / "2.trec"
    one.write_text("a Q0 x 1 2 t\nb Q0 x 1 2 t\n")
    two.write_text("c Q0 x 1 2 t\nb Q0 y 1 3 t\n")
    run = TrecFiles([one, two])
    assert {query_id: ranking.doc_ids for query_id, ranking in run.items()} == {
        "a": ("x",), "b": ("y", "x"), "c": ("x",),
    }  # fmt: skip
    two.write_text("c Q0 x 1 2 t\nb Q0 x 1 3 t\n")
    with pytest.raises(DataError, match=r"2\.trec:2: query 'b' lists document 'x' twice"):
        TrecFiles([one, two])["b"]


def test_a_run_on_disk_does_not_hold_its_documents(tmp_path: Path) -> None:
    """Without it mining from the runs of a million queries would need their documents in memory at once."""
    import tracemalloc

    path = tmp_path / "run.trec"
    with path.open("w") as file:
        for query in range(200):
            file.writelines(f"query-{query} Q0 document-{query}-{i} {i} {1000 - i} t\n" for i in range(200))
    tracemalloc.start()
    run = TrecFiles([path])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(run["query-7"]) == 200
    assert held < 200 * 1000 < path.stat().st_size


def test_rankings_share_the_ids_of_their_documents(tmp_path: Path) -> None:
    """Without it the pools of a million queries would hold each document's id a thousand times."""
    path = tmp_path / "run.trec"
    path.write_text("a Q0 document-1 1 2 t\nb Q0 document-1 1 2 t\n")
    run = TrecFiles([path])
    assert run["a"].doc_ids[0] is run["b"].doc_ids[0]
