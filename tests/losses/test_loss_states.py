"""What losses remember between steps: TAID's blend and the memory bank."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import random_inputs, value

from retrieval_kd.errors import DataError
from retrieval_kd.losses.bank import MemoryBank
from retrieval_kd.losses.inputs import EmbeddingInputs
from retrieval_kd.losses.listwise import interpolate
from retrieval_kd.losses.taid import TaidState

SCORES = random_inputs("scores")


def run(state: TaidState, losses: list[float]) -> list[float]:
    blends = []
    for step, loss in enumerate(losses, 1):
        state.update(SCORES, loss, step / len(losses))
        blends.append(state.blend)
    return blends


def test_the_blend_never_falls_and_never_lags_the_ramp() -> None:
    """A target that runs back would undo training; one that lags never reaches the teacher."""
    state = TaidState(start=0.2, rate=0.05)
    blends = run(state, [5.0, 4.0, 6.0, 1.0, 9.0, 0.5, 0.4, 0.3, 2.0, 0.1])
    assert blends == sorted(blends)
    assert all(blend >= 0.2 + 0.8 * step / 10 - 1e-12 for step, blend in enumerate(blends, 1))
    assert blends[-1] == 1.0


def test_a_falling_loss_moves_the_blend_faster() -> None:
    """The adaptive part: improvement raises the step."""
    falling, rising = (
        TaidState(start=0.0, end=1.0, rate=0.5, momentum=0.0),
        TaidState(start=0.0, rate=0.5, momentum=0.0),
    )
    for step, (down, up) in enumerate([(8.0, 1.0), (4.0, 2.0), (2.0, 4.0)], 1):
        falling.update(SCORES, down, step / 1000)
        rising.update(SCORES, up, step / 1000)
    assert falling.blend > rising.blend > 0


def test_one_update_by_hand() -> None:
    """Improvement .5, trend .005; step = 5e-4 * sigmoid(.005) * (1 - t)."""
    state = TaidState(start=0.4)
    state.update(SCORES, 2.0, 0.0)
    first = 0.4 + 5e-4 * 0.5 * 0.6
    assert state.blend == pytest.approx(first)
    state.update(SCORES, 1.0, 0.0)
    assert state.trend == pytest.approx(0.005)
    assert state.blend == pytest.approx(first + 5e-4 * 0.50125 * (1 - first), abs=1e-9)


def test_a_loss_of_zero_divides_nothing() -> None:
    """A student that is done has a relative improvement of 0 / 0."""
    state = TaidState()
    assert run(state, [0.0, 0.0, 1.0])[-1] == 1.0


def test_a_resumed_blend_goes_on_as_if_never_stopped() -> None:
    """A blend that restarts at .4 would move the target back towards the student."""
    whole, first, second = TaidState(), TaidState(), TaidState()
    losses = [3.0, 2.5, 2.7, 2.0]
    for step, loss in enumerate(losses):
        whole.update(SCORES, loss, step / 40)
        if step < 2:
            first.update(SCORES, loss, step / 40)
    second.restore(first.to_dict())
    for step, loss in list(enumerate(losses))[2:]:
        second.update(SCORES, loss, step / 40)
    assert second.to_dict() == whole.to_dict()
    filled = dataclasses.replace(SCORES, **second.fields())
    assert torch.isfinite(value("taid", filled))


def vectors(*rows: float) -> EmbeddingInputs:
    teacher = torch.tensor([[row, 1.0] for row in rows])
    return EmbeddingInputs(student=torch.zeros_like(teacher), teacher=teacher)


def test_the_bank_keeps_the_newest_in_order() -> None:
    """A bank that overwrote the wrong end would hold on to the first batch for ever."""
    bank = MemoryBank(size=3)
    assert bank.fields()["bank"].shape[0] == 0
    bank.update(vectors(1, 2), 0.0, 0.0)
    bank.update(vectors(3, 4), 0.0, 0.0)
    assert bank.fields()["bank"][:, 0].tolist() == [2.0, 3.0, 4.0]
    bank.update(vectors(5, 6, 7, 8), 0.0, 0.0)
    assert bank.fields()["bank"][:, 0].tolist() == [6.0, 7.0, 8.0]


def test_the_bank_keeps_a_text_once() -> None:
    """A bank longer than an epoch would hold each text as often as there were epochs, and the loss rise with them."""
    bank = MemoryBank(size=6)
    for rows in ((1, 2), (3, 1), (4, 5)):
        bank.update(vectors(*rows), 0.0, 0.0)
    assert bank.fields()["bank"][:, 0].tolist() == [2.0, 3.0, 1.0, 4.0, 5.0]


def test_a_bank_of_size_zero_stays_empty() -> None:
    """Slicing from minus zero would keep everything."""
    bank = MemoryBank(size=0)
    bank.update(vectors(1, 2), 0.0, 0.0)
    assert len(bank.fields()["bank"]) == 0
    inputs = dataclasses.replace(vectors(1, 2), student=torch.eye(2), **bank.fields())
    assert torch.isfinite(value("contrastive_kd", inputs))


def test_the_bank_holds_no_graph_and_survives_a_checkpoint() -> None:
    """A bank with gradients would keep every past step in memory."""
    bank, again = MemoryBank(size=8), MemoryBank(size=8)
    inputs = vectors(1, 2)
    bank.update(dataclasses.replace(inputs, teacher=inputs.teacher.clone().requires_grad_()), 0.0, 0.0)
    assert not bank.vectors.requires_grad
    again.restore(bank.to_dict())
    for one in (bank, again):
        one.update(vectors(3), 0.0, 0.0)
    assert torch.equal(bank.vectors, again.vectors)


def test_a_bank_refuses_what_has_no_vectors() -> None:
    """Bound to a score loss by mistake it would store scores as vectors."""
    with pytest.raises(DataError, match="embedding inputs"):
        MemoryBank().update(SCORES, 0.0, 0.0)
    with pytest.raises(DataError, match="size: -1"):
        MemoryBank(size=-1)


def test_a_blended_target_carries_no_gradient_and_keeps_both_ends() -> None:
    """Wrapped around a loss that trains its teacher too, the target must not pull the student towards itself."""
    student, teacher = torch.tensor([[1.0, 3.0]], requires_grad=True), torch.tensor([[5.0, 1.0]], requires_grad=True)
    assert not interpolate(student, teacher, torch.tensor(0.5)).requires_grad
    for blend, expected in ((0.0, [1.0, 3.0]), (0.25, [2.0, 2.5]), (1.0, [5.0, 1.0])):
        assert interpolate(student, teacher, torch.tensor(blend)).tolist() == [expected]
