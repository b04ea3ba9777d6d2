"""How far teachers agree: golden numbers, and what must not change them."""

import numpy as np
import pytest

from retrieval_kd.scores.agreement import agreement, agreements

nan = np.nan


def scores(*lists: list[float]) -> list[np.ndarray]:
    """Return lists of scores."""
    return [np.array(values, np.float32) for values in lists]


def test_golden_agreement() -> None:
    """Without it one pair in the wrong order would weigh as a whole list."""
    ours = scores([3, 2, 1], [1, 2, 3], [1, 2])
    theirs = scores([30, 10, 20], [3, 2, 1], [5, 7])
    found = agreement("a", ours, "b", theirs)
    assert (found.lists, found.pairs) == (3, 8)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.kendall_tau == pytest.approx((1 / 3 - 1 + 1) / 3)


def test_what_one_has_not_scored_does_not_count() -> None:
    """Without it a run cut at rank ten would disagree with everyone about what lies below."""
    ours, theirs = scores([1, 2, nan], [nan, 1], [nan, nan]), scores([1, 3, 9], [1, 2], [1, 2])
    found = agreement("a", ours, "b", theirs)
    assert (found.lists, found.pairs, found.top1, found.kendall_tau) == (1, 2, 1.0, 1.0)
    nothing = agreement("a", ours[2:], "b", theirs[2:])
    assert (nothing.lists, nothing.top1, nothing.kendall_tau) == (0, None, None)


def test_ties_are_no_disagreement() -> None:
    """Without it the place of a document in its list would decide whether teachers agree."""
    found = agreement("a", scores([1, 1, 0]), "b", scores([0, 1, 0]))
    assert found.top1 == 1
    flat = agreement("a", scores([1, 1]), "b", scores([0, 1]))
    assert (flat.top1, flat.kendall_tau) == (1, None)


def test_scale_and_order_of_teachers_do_not_matter() -> None:
    """Without it a teacher of logits would agree less with itself than with one of probabilities."""
    draw = np.random.default_rng([4])
    ours, theirs = ([draw.normal(size=n) for n in (5, 9, 2)] for _ in range(2))
    one = agreement("a", ours, "b", theirs)
    other = agreement("b", [7 * values - 3 for values in theirs], "a", ours)
    assert (one.top1, one.kendall_tau) == pytest.approx((other.top1, other.kendall_tau))
    assert agreement("a", ours, "a", ours).kendall_tau == pytest.approx(1)
    assert agreement("a", ours, "b", [-values for values in ours]).kendall_tau == pytest.approx(-1)


def test_every_two_teachers_are_compared() -> None:
    """Without it the third teacher could be the first's copy and nobody would see."""
    named = {name: scores([1, 2]) for name in "abc"}
    assert [(one.first, one.second) for one in agreements(named)] == [("a", "b"), ("a", "c"), ("b", "c")]
