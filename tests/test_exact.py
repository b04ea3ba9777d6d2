"""Exhaustive search against a naive reference, where the last bit decides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_kd.errors import DataError
from retrieval_kd.exact import exact_search
from retrieval_kd.runs import Ranking, rank


def corpus_of(vectors: np.ndarray, ids: list[str] | None = None) -> Any:
    return SimpleNamespace(ids=ids or [f"d{i:04d}" for i in range(len(vectors))], vectors=vectors)


def naive(query: np.ndarray, corpus: Any, k: int) -> Ranking:
    """Score every document in float64, round, sort: what exact search must return."""
    scores = [np.float32((row.astype(np.float64) * query.astype(np.float64)).sum()) for row in corpus.vectors]
    return rank(corpus.ids, np.array(scores, dtype=np.float32), k)


def same(one: Ranking, other: Ranking) -> bool:
    return one.doc_ids == other.doc_ids and np.array_equal(one.scores, other.scores)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 25),
    st.sampled_from(["grid", "unit", "duplicates", "tiny", "huge"]),
)
@settings(deadline=None, max_examples=150)
def test_equals_the_naive_search_for_any_block_and_any_k(
    seed: int, n: int, d: int, queries: int, k: int, block: int, kind: str
) -> None:
    """A candidate lost at a block's edge or a tie cut at k shows only on some inputs."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, d)).astype(np.float32)
    asked = rng.standard_normal((queries, d)).astype(np.float32)
    if kind == "grid":  # nearly everything ties
        vectors, asked = np.sign(vectors).astype(np.float32), np.sign(asked).astype(np.float32)
    elif kind == "unit":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    elif kind == "duplicates":
        vectors = vectors[rng.integers(0, min(3, n), n)]
    elif kind == "tiny":
        vectors *= np.float32(1e-38)
    elif kind == "huge":
        vectors *= np.float32(1e15)
    ids = [f"d{i}" for i in rng.permutation(n)]
    corpus = corpus_of(vectors, ids)
    run = exact_search([f"q{i}" for i in range(queries)], asked, corpus, k, block_rows=block)
    for i in range(queries):
        assert same(run[f"q{i}"], naive(asked[i], corpus, k))


def test_one_query_and_a_batch_give_the_same_bits() -> None:
    """The matrix product's last digits depend on the batch; an answer must not."""
    rng = np.random.default_rng(7)
    corpus = corpus_of(rng.standard_normal((700, 96)).astype(np.float32))
    asked = rng.standard_normal((33, 96)).astype(np.float32)
    ids = [f"q{i}" for i in range(33)]
    batch = exact_search(ids, asked, corpus, 10, block_rows=128)
    for i, query_id in enumerate(ids):
        assert same(batch[query_id], exact_search([query_id], asked[i : i + 1], corpus, 10)[query_id])


def test_near_ties_are_ordered_by_the_exact_score_not_the_product() -> None:
    """Documents one float32 step apart change places in a float32 product; candidates must cover them."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(384).astype(np.float32)
    base /= np.linalg.norm(base)
    vectors = np.repeat(base[None], 400, axis=0)
    vectors[np.arange(400), rng.integers(0, 384, 400)] *= np.float32(1 + 2**-20)
    corpus = corpus_of(vectors, [f"d{i}" for i in rng.permutation(400)])
    for block in (7, 64, 400):
        assert same(exact_search(["q"], base[None], corpus, 20, block_rows=block)["q"], naive(base, corpus, 20))


def test_near_ties_among_documents_whose_squares_underflow() -> None:
    """The longest of them would count as 0 long, and nothing that the product rounded down be scored again."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(384)
    near = ((base + rng.standard_normal((300, 384)) * 1e-7) * 1e-25).astype(np.float32)
    asked = (base + rng.standard_normal((20, 384))).astype(np.float32)
    run = exact_search([f"q{i:02d}" for i in range(20)], asked, corpus_of(near), 5)
    assert all(same(run[f"q{i:02d}"], naive(asked[i], corpus_of(near), 5)) for i in range(20))


def test_boundary_ties_keep_the_smallest_ids() -> None:
    """Equal vectors at rank k: the ids decide, not where the block ended."""
    corpus = corpus_of(np.ones((50, 4), dtype=np.float32), [f"d{49 - i:02d}" for i in range(50)])
    for block in (1, 3, 7, 50):
        run = exact_search(["q"], np.ones((1, 4), dtype=np.float32), corpus, 3, block_rows=block)
        assert run["q"].doc_ids == ("d00", "d01", "d02")


def test_more_queries_than_one_chunk() -> None:
    """Query chunks must not overwrite one another."""
    rng = np.random.default_rng(5)
    corpus = corpus_of(rng.standard_normal((20, 3)).astype(np.float32))
    asked = rng.standard_normal((1030, 3)).astype(np.float32)
    run = exact_search([str(i) for i in range(1030)], asked, corpus, 2)
    assert len(run) == 1030
    for i in (0, 1023, 1024, 1029):
        assert same(run[str(i)], naive(asked[i], corpus, 2))


def test_limits() -> None:
    """No query gives no ranking; k beyond the corpus gives all of it."""
    corpus = corpus_of(np.eye(3, dtype=np.float32))
    assert exact_search([], np.zeros((0, 3), dtype=np.float32), corpus, 5) == {}
    assert len(exact_search(["q"], np.eye(3, dtype=np.float32)[:1], corpus, 99)["q"]) == 3


@pytest.mark.parametrize(
    ("ids", "vectors", "k", "part"),
    [
        (["q"], np.zeros((1, 2)), 1, "query vectors of shape (1, 2), expected 1 ids by 3"),
        (["q"], np.zeros((2, 3)), 1, "query vectors of shape (2, 3), expected 1 ids"),
        (["q", "q"], np.zeros((2, 3)), 1, "query 'q' occurs twice"),
        (["p", "q"], np.array([[0, 0, 0], [0, np.nan, 0]]), 1, "the vector of query 'q' is not finite"),
        (["q"], np.zeros((1, 3)), 0, "k 0 and block_rows 16384 must be at least 1"),
    ],
)
def test_wrong_queries_are_refused(ids: list[str], vectors: np.ndarray, k: int, part: str) -> None:
    """NaN compares false with everything: the query would come back empty and score zero."""
    with pytest.raises(DataError) as error:
        exact_search(ids, vectors.astype(np.float32), corpus_of(np.eye(3, dtype=np.float32)), k)
    assert part in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_document_that_is_not_finite_is_named(bad: float) -> None:
    """A torn shard must not silently drop out of every ranking."""
    vectors = np.eye(3, dtype=np.float32)
    vectors[1, 1] = bad
    with pytest.raises(DataError, match="the vector of document 'd0001' is not finite"):
        exact_search(["q"], np.eye(3, dtype=np.float32)[:1], corpus_of(vectors), 1, block_rows=2)


SEARCH_A_MILLION = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from retrieval_kd.exact import exact_search
vectors = np.load(sys.argv[1], mmap_mode="r")
corpus = SimpleNamespace(ids=[f"d{i:07d}" for i in range(len(vectors))], vectors=vectors)
queries = np.array(vectors[:: len(vectors) // 32][:32])
for block in (16384, 50000):
    run = exact_search([f"q{i}" for i in range(32)], queries, corpus, 100, block_rows=block)
    print(run["q3"].doc_ids[0], hash(tuple((r.doc_ids, r.scores.tobytes()) for r in run.values())))
# Not ru_maxrss: what is spawned inherits the peak of its parent, which may be larger.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_a_million_documents_are_searched_in_less_than_two_gigabytes(tmp_path: Path) -> None:
    """Tools that keep every block's best, or map the corpus and keep its pages, need tens of gigabytes."""
    rng = np.random.default_rng(0)
    rows, width = 1_000_000, 384
    vectors = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", dtype=np.float32, shape=(rows, width))
    part = rng.standard_normal((50_000, width), dtype=np.float32)
    for start in range(0, rows, len(part)):
        vectors[start : start + len(part)] = np.roll(part, start // len(part), axis=1)
    vectors.flush()
    del vectors
    verb = [sys.executable, "-c", SEARCH_A_MILLION, str(tmp_path / "v.npy")]
    done = subprocess.run(verb, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    one, other, kilobytes = done.stdout.splitlines()
    assert one == other
    assert one.startswith(f"d{3 * (rows // 32):07d} ")
    assert int(kilobytes) < 2_000_000
