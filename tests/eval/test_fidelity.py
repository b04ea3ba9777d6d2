"""Agreement of student and teacher, by hand."""

from __future__ import annotations

import pytest

from eval.fidelity import fidelity
from retrieval_kd.errors import DataError
from retrieval_kd.runs import rank

TEACHER = {"q1": rank(["a", "b", "c"], [3.0, 2.0, 1.0]), "q2": rank(["a", "b"], [2.0, 1.0])}


def test_a_student_that_copies_is_perfect() -> None:
    """The upper end of every figure."""
    same = fidelity(TEACHER, TEACHER)
    assert (same.top1, same.overlap, same.kendall_tau, same.queries, same.compared) == (1.0, 1.0, 1.0, 2, 2)
    assert same.correlation == pytest.approx(1.0)


def test_a_reversed_and_a_missing_query() -> None:
    """A query the student misses lowers top-1 and overlap, and is not in the rank correlation."""
    student = {"q1": rank(["c", "b", "a"], [3.0, 2.0, 1.0])}
    found = fidelity(student, TEACHER, depth=2)
    assert (found.top1, found.overlap, found.kendall_tau, found.compared) == (0.0, 0.25, -1.0, 1)


def test_nothing_in_common_is_zero_not_nan() -> None:
    """NaN would poison the report."""
    found = fidelity({"q1": rank(["x"], [1.0])}, TEACHER)
    assert (found.overlap, found.kendall_tau, found.correlation, found.compared) == (0.0, 0.0, 0.0, 0)


def test_refusals() -> None:
    """An empty teacher has no ranking to be faithful to."""
    with pytest.raises(DataError, match="teacher's run is empty"):
        fidelity({}, {})
    with pytest.raises(DataError, match="depth 0"):
        fidelity({}, TEACHER, depth=0)
