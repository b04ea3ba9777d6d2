"""Ragged lists over the distinct documents of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.training.batches import TrainingSet, assemble, epoch_batches


def _data(**changes: object) -> TrainingSet:
    values: dict[str, object] = {
        "lists": [
            CandidateList("q1", ("a", "b", "c"), (1, 0, 0)),
            CandidateList("q2", ("c", "a"), (2, 0)),
            CandidateList("q3", ("d", "b"), (1, 0)),
        ],
        "texts": {"q1": "one", "q2": "two", "q3": "three"},
        "teacher": [np.array([3.0, 2.0, 1.0], np.float32), np.array([5.0, 4.0], np.float32), np.zeros(2, np.float32)],
        "qrels": {"q1": {"a": 1, "c": 1}, "q2": {"c": 2, "x": 1}, "q3": {"d": 1, "a": 0}},
        "query_targets": np.eye(3, dtype=np.float32),
        **changes,
    }
    return TrainingSet(**values)  # type: ignore[arg-type]


def test_shared_documents_stand_once_and_columns_point_at_them() -> None:
    """Without it a document in two lists would be encoded twice, or a score would be paired with another document."""
    batch = assemble(_data(), np.array([0, 1]))
    assert batch.doc_ids == ("a", "b", "c")
    assert batch.columns.tolist() == [[0, 1, 2], [2, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.teacher is not None
    assert batch.teacher.tolist() == [[3, 2, 1], [5, 4, 0]]


def test_in_batch_positives_come_from_the_judgements_not_from_the_list() -> None:
    """Without it a second relevant document, mined for another query, would be pushed away as a negative."""
    batch = assemble(_data(), np.array([0, 1, 2]))
    positives = [[doc for doc, hit in zip(batch.doc_ids, row, strict=True) if hit] for row in batch.positives.tolist()]
    assert positives == [["a", "c"], ["c"], ["d"]]


def test_gathered_scores_equal_scores_pair_by_pair() -> None:
    """Without it the gather could transpose queries and documents and still have the right shape."""
    data, rows = _data(), np.array([2, 0])
    batch = assemble(data, rows)
    vectors = {doc: torch.randn(4, generator=torch.Generator().manual_seed(ord(doc))) for doc in "abcd"}
    queries = torch.randn(2, 4, generator=torch.Generator().manual_seed(9))
    scores = (queries @ torch.stack([vectors[doc] for doc in batch.doc_ids]).T).gather(1, batch.columns)
    for i, row in enumerate(rows):
        for j, doc in enumerate(data.lists[row].doc_ids):
            assert scores[i, j] == pytest.approx(float(queries[i] @ vectors[doc]), rel=1e-5)


def test_an_epoch_is_a_permutation_made_of_seed_and_epoch() -> None:
    """Without it a resumed epoch would see other batches, or some queries twice and others never."""
    batches = list(epoch_batches(10, 4, seed=1, epoch=0))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches).tolist()) == list(range(10))
    again = list(epoch_batches(10, 4, seed=1, epoch=0))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(list(epoch_batches(10, 4, seed=1, epoch=1))))


def test_a_limited_epoch_is_the_start_of_the_whole_one() -> None:
    """Without it a shorter budget would train on the same few queries in every epoch."""
    limited = [np.concatenate(list(epoch_batches(10, 4, 1, epoch, limit=6))) for epoch in range(2)]
    assert [len(rows) for rows in limited] == [6, 6]
    assert set(limited[0]) != set(limited[1])
    assert limited[0].tolist() == np.concatenate(list(epoch_batches(10, 4, 1, 0)))[:6].tolist()


def test_parts_that_do_not_belong_together_are_refused() -> None:
    """Without it teacher scores of other candidates would be taken for these."""
    with pytest.raises(DataError, match="query 'q1': 3 candidates, 2 teacher scores"):
        _data(teacher=[np.zeros(2, np.float32)] * 3)
    with pytest.raises(DataError, match="make all from the same candidates"):
        _data(query_targets=np.eye(2, dtype=np.float32))
