"""Names, options and inputs as a recipe and the training loop use them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from loss_cases import LIST, random_inputs, value

import retrieval_kd.losses
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.losses.bank import MemoryBank
from retrieval_kd.losses.registry import LOSSES, bind, bind_state, loss_info
from retrieval_kd.losses.taid import TaidState


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_needs_are_the_functions_parameters_and_fields_of_its_kind(name: str) -> None:
    """The loop passes fields by position: another order would swap student and teacher without a word."""
    info = LOSSES[name]
    inputs = random_inputs(info.kind)
    fields = {field.name for field in dataclasses.fields(inputs)}
    assert set(info.needs) <= fields
    assert info.needs == tuple(
        p.name
        for p in inspect.signature(info.function).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
    )
    assert info.needs[0] == "student"
    assert info.source
    result = value(name, inputs)
    assert result.dim() == 0
    assert torch.isfinite(result)


def test_options_reach_the_loss() -> None:
    """An option that is checked and then dropped trains with the default."""
    plain, hot = value("listwise_kl", LIST), value("listwise_kl", LIST, {"student_temperature": 4.0})
    assert plain.item() != pytest.approx(hot.item())


def test_unknown_names_suggest_the_nearest() -> None:
    """A typo in a recipe should cost seconds."""
    with pytest.raises(RecipeError, match="no loss 'margin_mes', did you mean 'margin_mse'"):
        bind("margin_mes", {})
    with pytest.raises(RecipeError, match="no option 'temprature', did you mean 'temperature'"):
        bind("info_nce", {"temprature": 1.0})
    with pytest.raises(RecipeError, match="no option 'weight'; it takes none"):
        bind("relational_distance", {"weight": 1.0})


def test_inputs_that_a_batch_lacks_are_named() -> None:
    """None inside a loss would be an AttributeError deep in a step."""
    with pytest.raises(DataError, match="margin_mse needs 'teacher'"):
        LOSSES["margin_mse"].arguments(dataclasses.replace(LIST, teacher=None))
    with pytest.raises(DataError, match="tct needs 'scored'"):
        LOSSES["tct"].arguments(LIST)


def test_options_of_a_state_go_to_the_state() -> None:
    """One mapping in the recipe serves both; neither swallows the other's."""
    options = {"start": 0.2, "student_temperature": 0.5}
    state = bind_state("taid", options)
    assert isinstance(state, TaidState)
    assert state.start == 0.2
    assert torch.isfinite(bind("taid", options)(*LOSSES["taid"].arguments(LIST)))
    bank = bind_state("contrastive_kd", {"size": 7})
    assert isinstance(bank, MemoryBank)
    assert bank.size == 7
    assert bind_state("margin_mse", {}) is None
    with pytest.raises(RecipeError, match=r"start: 2 is not a number in 0\.\.1"):
        bind("taid", {"start": 2})
    with pytest.raises(RecipeError, match=r"start: 0\.9 must not be above end: 0\.5"):
        bind_state("taid", {"start": 0.9, "end": 0.5})


def test_taid_moves_the_target_of_the_loss_it_is_told() -> None:
    """Without it a recipe could name a loss that has no target, or options of another loss would pass unread."""
    info = loss_info("taid", {"of": "tct"})
    assert (info.name, info.kind, info.needs[-1]) == ("taid", "in_batch", "blend")
    assert isinstance(bind_state("taid", {"of": "tct", "gamma": 0.5, "start": 0.2}), TaidState)
    assert loss_info("taid", {"of": "listwise_kl"}) is LOSSES["taid"]
    assert "blend" not in LOSSES["tct"].needs
    with pytest.raises(RecipeError, match="taid cannot be of 'ranknet'; name one of listwise_kl, prod"):
        bind("taid", {"of": "ranknet"})
    with pytest.raises(RecipeError, match="taid has no option 'gamma'"):
        bind("taid", {"of": "prod", "gamma": 0.5})
    with pytest.raises(RecipeError, match="tct has no option 'of'"):
        bind("tct", {"of": "prod"})


def test_losses_import_torch_and_nothing_else_of_ours() -> None:
    """A loss never sees a model, a file or a recipe."""
    for path in Path(retrieval_kd.losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.startswith("retrieval_kd"):
                    assert name.startswith(("retrieval_kd.losses", "retrieval_kd.errors")), f"{path.name}: {name}"
                assert not name.startswith(("transformers", "sentence_transformers", "accelerate")), path.name
