"""Scoring many pairs: one shard of texts at a time, each pair once, whatever the lists are."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from retrieval_kd.runs import Scores, Shortlist
from retrieval_kd.scores.store import ScoreSource, ScoreStore
from retrieval_kd.teachers.scoring import score_candidates

from .conftest import TinyCollection


class Lengths:
    """Scores a pair by the length of its document."""

    name = fingerprint = "lengths"
    source = ScoreSource("lengths", "r")
    parameters = 0

    def __init__(self) -> None:
        """Remember how many pairs came at a time."""
        self.sizes: list[int] = []

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: object = None) -> Scores:
        """Return lengths."""
        self.sizes.append(len(pairs))
        return np.array([len(document) for _, document in pairs], np.float32)


class Watched(TinyCollection):
    """A collection that remembers the largest number of texts asked for at once."""

    largest = 0

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return texts by id."""
        wanted = list(doc_ids)
        self.largest = max(self.largest, len(wanted))
        return super().contents(wanted)


class Streamed:
    """Lists made anew whenever they are read; the first query's come again at the end."""

    def __iter__(self) -> Iterator[Shortlist]:
        """Yield the lists."""
        for i in [*range(10), 0]:
            yield Shortlist(f"q{i}", tuple(f"d{(i + j) % 40}" for j in range(12 if i else 15)))
        yield Shortlist("q0", ("d39", "d1", "d38"))


def test_lists_are_streamed_and_texts_come_by_the_shard(tmp_path: Path) -> None:
    """Without it a million pairs would need the memory of their texts, or a repeated pair be scored twice."""
    collection, teacher = Watched(), Lengths()
    artifact = score_candidates(teacher, collection, Streamed(), tmp_path / "s", pairs_per_shard=7)
    assert artifact.summary == {"pairs": 15 + 9 * 12 + 2, "queries": 10}
    assert collection.largest <= 7
    assert teacher.sizes == [7] * 17 + [6]
    texts = collection.contents(["d39", "d14"])
    (scores,) = ScoreStore.open(tmp_path / "s").score_lists([Shortlist("q0", ("d39", "d14"))])
    assert scores.tolist() == [len(texts["d39"]), len(texts["d14"])]


def test_the_lists_decide_the_store_and_not_how_they_are_held(tmp_path: Path) -> None:
    """Without it a run that streams could not go on where one that did not was killed."""
    one = score_candidates(Lengths(), TinyCollection(), Streamed(), tmp_path / "a", pairs_per_shard=50)
    other = score_candidates(Lengths(), TinyCollection(), list(Streamed()), tmp_path / "b", pairs_per_shard=50)
    assert one.fingerprint == other.fingerprint
    assert [entry.sha256 for entry in one.files] == [entry.sha256 for entry in other.files]
