"""Agreement of student and teacher, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eval.fidelity import cosines, fidelity, require_retrieval
from eval.measures import Evaluation
from eval.significance import compare
from retrieval_kd.errors import DataError, QualityError
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


def test_the_divergence_by_hand() -> None:
    """The wrong direction, or a missing normalisation, makes students of another score scale look unfaithful."""
    assert fidelity(TEACHER, TEACHER).divergence == pytest.approx(0.0, abs=1e-12)
    stretched = {q: rank(r.doc_ids, 100 * r.scores - 7) for q, r in TEACHER.items()}
    assert fidelity(stretched, TEACHER).divergence == pytest.approx(0.0, abs=1e-9)
    # Two documents in opposite order: z-scores (1, -1) and (-1, 1), softmax p = 1 / (1 + exp(-2)).
    turned = fidelity({"q2": rank(["b", "a"], [2.0, 1.0])}, {"q2": TEACHER["q2"]})
    p = 1 / (1 + np.exp(-2))
    assert turned.divergence == pytest.approx((2 * p - 1) * np.log(p / (1 - p)))


def test_cosines_by_hand() -> None:
    """A percentile from the wrong end hides exactly the queries that went astray."""
    student = np.array([[1, 0], [0, 2], [1, 1]], dtype=np.float32)
    teacher = np.array([[3, 0], [0, -1], [1, 0]], dtype=np.float32)
    found = cosines(student, teacher)
    assert found["mean"] == pytest.approx((1 - 1 + np.sqrt(0.5)) / 3)
    assert found["p50"] == pytest.approx(np.sqrt(0.5))
    assert found["p1"] < found["p5"] < found["p25"] < 0
    with pytest.raises(DataError, match="same texts"):
        cosines(student, teacher[:2])


def _compared(differences: list[float]) -> object:
    ids = tuple(f"q{i}" for i in range(len(differences)))
    base = np.full(len(ids), 0.5)
    evaluations = {
        "teacher": Evaluation(ids, {"nDCG@10": base}, ()),
        "student": Evaluation(ids, {"nDCG@10": base + np.array(differences)}, ()),
    }
    return compare(evaluations, "teacher", "nDCG@10")[0]


def test_the_gate_decides_on_retrieval_and_on_what_is_certain() -> None:
    """A student that is near in cosine but loses documents passes a cosine gate; too few queries pass any mean."""
    require_retrieval(_compared([-0.01, 0.01] * 200), max_loss=0.01)  # type: ignore[arg-type]
    with pytest.raises(QualityError, match=r"may lose more than 0\.01 nDCG@10 against 'teacher': difference -0\.0500"):
        require_retrieval(_compared([-0.05] * 50), max_loss=0.01)  # type: ignore[arg-type]
    with pytest.raises(QualityError, match="95 % interval"):
        require_retrieval(_compared([0.3, -0.3, 0.1, -0.1]), max_loss=0.01)  # type: ignore[arg-type]
