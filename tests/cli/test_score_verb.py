"""``rkd score``: a recipe's candidates, and scores that anybody wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_overrides
from typer.testing import CliRunner

from retrieval_kd.cli.main import app
from retrieval_kd.errors import DataError


def rkd(*arguments: object) -> str:
    """Run the command and return what it printed."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return a run, and a file of scores that ties, lacks a pair and has a NaN."""
    run, table = tmp_path / "one.trec", tmp_path / "two.tsv"
    run.write_text("q1 Q0 a 1 300 x\nq1 Q0 b 2 1 x\nq2 Q0 a 1 2 x\nq2 Q0 c 2 1 x\n")
    table.write_text("q1\ta\t0.5\nq1\tb\t0.5\nq2\ta\t0.1\nq2\tc\t0.9\nq3\tz\tnan\n")
    return [run, table]


def test_any_scores_are_inspected(files: list[Path]) -> None:
    """Without it a NaN, a tie or a scale that underflows would first be seen in a student that learned nothing."""
    report = json.loads(rkd("score", "inspect", *files, "--json"))
    one, two = report["teachers"]["one.trec"], report["teachers"]["two.tsv"]
    assert (one["pairs"], one["tied"], one["not_finite"], one["widest_spread"]) == (4, 0, 0, 299)
    assert (two["queries"], two["pairs"], two["tied"], two["not_finite"], two["equal_lists"]) == (3, 5, 0.5, 1, 1)
    assert any("underflow" in line for line in one["warnings"])
    assert one["temperature"] > 0
    (agreement,) = report["agreements"]
    assert (agreement["lists"], agreement["pairs"], agreement["top1"]) == (2, 4, 0.5)
    text = rkd("score", "inspect", *files)
    assert "one.trec and two.tsv" in text
    assert "two.tsv: 1 of 5 scores are NaN or infinite; mend the teacher" in text


def test_a_file_without_a_finite_list_is_named(files: list[Path], tmp_path: Path) -> None:
    """Without it nobody could tell which of many teachers has nothing to say."""
    (tmp_path / "nan.tsv").write_text("q1\ta\tnan\nq1\tb\tnan\n")
    with pytest.raises(DataError, match=r"nan\.tsv: 1 score lists, none with finite scores only"):
        rkd("score", "inspect", *files, tmp_path / "nan.tsv")


def test_a_recipe_is_scored_and_its_members_compared(tiny: Path, tmp_path: Path) -> None:
    """Without it the temperature would be that of one member's logits, and not of what the student learns."""
    options = [f"--set={item}" for item in tiny_overrides(tiny, "asymmetric")]
    arguments = ("score", *options, "margin_mse", "--artifacts", tiny / "artifacts")
    report = json.loads(rkd(*arguments, "--json"))
    assert list(report["teachers"]) == ["teacher", "cross-encoder", "bi-encoder"]
    assert len(report["agreements"]) == 3
    assert report["teachers"]["teacher"]["pairs"] == report["teachers"]["bi-encoder"]["pairs"] > 0
    assert "cross-encoder and bi-encoder" in rkd(*arguments)
    store = next((tiny / "artifacts").glob("score-*"))
    inspected = json.loads(rkd("score", "inspect", store, "--json"))
    assert inspected["teachers"][store.name]["not_finite"] == 0


def test_wrong_usage_is_still_wrong_usage() -> None:
    """Without it the verb would swallow a missing recipe, and its help be that of one of its halves."""
    assert CliRunner().invoke(app, ["score"]).exit_code == 2
    assert CliRunner().invoke(app, ["score", "inspect"]).exit_code == 2
    help_text = rkd("score", "--help")
    assert "inspect" in help_text
    assert "recipe" in help_text
