"""Every loss against numbers worked out by hand or taken from its paper."""

from __future__ import annotations

import pytest
from loss_cases import GOLDEN, HEADS, Golden, gradient, value

from retrieval_kd.losses.registry import LOSSES


def test_every_registered_loss_has_a_golden_number() -> None:
    """A loss without one could be off by a factor and still train."""
    assert {golden.name for golden in GOLDEN} == set(LOSSES)
    assert len(LOSSES) == 28


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.name}-{g.options}")
def test_golden_number(golden: Golden) -> None:
    """A wrong sign, direction, reduction or temperature still gives a loss that falls, for the wrong reason."""
    assert value(golden.name, golden.inputs, golden.options).item() == pytest.approx(golden.expected, abs=2e-6)


def test_three_equal_heads_still_learn_from_their_sum() -> None:
    """The summed ensemble sharpens; a detached copy of one head in its place would give no gradient."""
    assert (gradient("self_distillation", HEADS) * 3)[0, 0].tolist() == pytest.approx(
        [-0.263666, 0.150715, 0.112951], abs=1e-6
    )
