"""PROD's data-progressive selection: the teacher is right, the student is not yet."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.mining.selection import SelectionReport, in_disagreement
from retrieval_kd.recipes.schema import SelectionSpec


def one(positives: int = 1, length: int = 20) -> CandidateList:
    labels = (*(1 for _ in range(positives)), *(0 for _ in range(length - positives)))
    return CandidateList("q", tuple(f"d{i:02}" for i in range(length)), labels)


def placing(place: int, length: int = 20) -> np.ndarray:
    """Return scores that rank the first document at ``place`` and the others in their order."""
    scores = -np.arange(length, dtype=np.float32)
    scores[0] = 0.5 - place
    return scores


def kept(teacher: int, student: int, spec: SelectionSpec) -> tuple[bool, dict[str, int]]:
    report = SelectionReport()
    lists = list(in_disagreement([one()], [placing(teacher)], [placing(student)], spec, report))
    assert report.lists == 1
    assert report.kept == len(lists)
    return bool(lists), dict(report.removed)


PROD = SelectionSpec("disagreement")


@pytest.mark.parametrize(
    ("teacher", "student", "why"),
    [
        (1, 1, "that the student ranks well already"),
        (1, 2, ""),
        (1, 15, ""),
        (1, 16, "that the student ranks too low"),
        (2, 5, "that the teacher ranks too low"),
    ],
)
def test_prods_rule_at_its_edges(teacher: int, student: int, why: str) -> None:
    """Without it ranks counted from 0, or an end left out, would keep what the paper drops."""
    assert kept(teacher, student, PROD) == (not why, {why: 1} if why else {})


def test_a_student_that_agrees_with_its_teacher_leaves_nothing() -> None:
    """Without it the selection would not be about disagreement: student == teacher is its fixed point."""
    rng = np.random.default_rng(0)
    lists = [one() for _ in range(200)]
    scores = [rng.normal(size=20).astype(np.float32) for _ in lists]
    assert list(in_disagreement(lists, scores, scores, PROD, SelectionReport())) == []


def test_ties_and_several_positives() -> None:
    """Without it a student whose scores are all equal would rank every positive first, by the order of its list."""
    flat = np.zeros(20, dtype=np.float32)
    report = SelectionReport()
    # Ties are broken by document id, and the positive's id is the smallest: rank 1 as in any run.
    assert not list(in_disagreement([one()], [placing(1)], [flat], PROD, report))
    two = one(positives=2)
    first_low = placing(20)  # the second positive then ranks first
    assert not list(in_disagreement([two], [placing(1)], [first_low], PROD, report))
    assert report.removed == {"that the student ranks well already": 2}
