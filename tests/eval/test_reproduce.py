"""A published figure is the same, differs, or is not there: never zero by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.reproduce import Expected, Outcome, Table, figure, read_tables, reproduce
from eval.tables import outcome_table
from retrieval_kd.errors import DataError

GOOD = """
- name: bm25
  command: rkd eval beir {data} --system bm25 --timed 0
  expect:
    - {system: BM25, measure: RR@10, value: 0.5, tolerance: 0.001}
"""
REPORT = {"measures": ["RR@10"], "systems": [{"name": "BM25", "RR@10": 0.5}]}
SUMMARY = {
    "measures": ["RR@10"],
    "systems": [{"name": "BM25", "sets": {"a": {"RR@10": 0.2}, "b": {"RR@10": 0.4}}, "mean": {"RR@10": 0.3}}],
}


def test_a_file_is_read_and_filled(tmp_path: Path) -> None:
    """A path left as {data} would be looked for as a folder of that name."""
    path = tmp_path / "tables.yaml"
    path.write_text(GOOD)
    (table,) = read_tables(path, {"data": "/somewhere"})
    assert table.command == "rkd eval beir /somewhere --system bm25 --timed 0"
    assert table.expect == (Expected("BM25", "RR@10", 0.5, 0.001),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: bm25", "title: bm25", "table 1: unknown key 'title'"),
        ("measure: RR@10, ", "", "table 1: no 'measure'; needed are system, measure, value, tolerance"),
        ("tolerance", "tolerence", "unknown key 'tolerence', did you mean 'tolerance'"),
        ("value: 0.5", "value: high", "table 1: value 'high' of 'BM25' is not a finite number"),
        ("value: 0.5", "value: .nan", "not a finite number"),
        ("0.001", "-1", "must not be negative"),
        ("system: BM25", "system: [1]", r"table 1: system \[1\] is not a text; put"),
        ("measure: RR@10", "measure: 5", "table 1: measure 5 is not a text"),
        ("system: BM25", "set: 2020, system: BM25", "table 1: set 2020 is not a text"),
        ("{data}", "'{data}", 'table 1: command "rkd .*": no closing quotation; mend its quotes'),
        ("rkd eval", "rm -r", "does not start with rkd"),
        ("{data}", "{folder}", r"no value for \{folder\}; give it with --set folder=VALUE"),
        (GOOD, "name: x", "not a list of tables"),
        (GOOD, "- 1", "1 is not a mapping of name, command, expect"),
        (GOOD, "[", r"tables\.yaml:1: not YAML \(.*\); mend the line"),
        ("value: 0.5", "value: 2024-13-45", "value '2024-13-45' of 'BM25' is not a finite number"),
        ("value: 0.5", "value: 0.5, value: 0.9", r"tables\.yaml:5: not YAML \(key 'value' stands in line 5 already\)"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    """A misspelt tolerance must not become a tolerance of anything."""
    path = tmp_path / "tables.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(DataError, match=message) as error:
        read_tables(path, {"data": "x"})
    assert "\n" not in str(error.value)


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    """Saved as Latin-1, a file ended in a trace."""
    path = tmp_path / "tables.yaml"
    path.write_bytes(GOOD.replace("name: bm25", "name: é").encode("latin-1"))
    with pytest.raises(DataError, match=r"tables\.yaml: cannot read it \(.*utf-8.*\); give a YAML list of tables"):
        read_tables(path, {"data": "x"})
    path.write_text(GOOD.replace("RR@10", "'RR@10'").replace("system: BM25", "set: '2020', system: BM25"))
    assert read_tables(path, {"data": "'a b'"})[0].expect[0].set == "2020"


def test_figures_are_found_or_refused() -> None:
    """A figure that is not there and reads as 0.0 has passed reviews before."""
    assert figure(REPORT, Expected("BM25", "RR@10", 0, 0)) == 0.5
    assert figure(SUMMARY, Expected("BM25", "RR@10", 0, 0, "b")) == 0.4
    assert figure(SUMMARY, Expected("BM25", "RR@10", 0, 0, "mean")) == 0.3
    for report, expected, message in (
        (REPORT, Expected("BM52", "RR@10", 0, 0), "no system 'BM52', did you mean 'BM25'"),
        (REPORT, Expected("BM25", "RR@1", 0, 0), "no measure 'RR@1'"),
        (REPORT, Expected("BM25", "RR@10", 0, 0, "a"), "no set 'a': the command measures one collection; leave set"),
        (SUMMARY, Expected("BM25", "RR@10", 0, 0, "c"), "no set 'c'"),
        (SUMMARY, Expected("BM25", "RR@10", 0, 0), "no set ''"),
    ):
        with pytest.raises(DataError, match=message):
            figure(report, expected)


def test_the_tolerance_includes_its_end_and_nothing_beyond() -> None:
    """0.3 - 0.2 is not 0.1 in floats; a missing figure is never within any tolerance."""
    expected = Expected("s", "m", 0.2, 0.1)
    assert Outcome("t", expected, 0.3).ok
    assert not Outcome("t", expected, 0.3001).ok
    assert not Outcome("t", Expected("s", "m", 0.0, 1.0), None, "no system").ok


def test_commands_are_run_and_marked(tiny: Path, tmp_path: Path) -> None:
    """A command that fails, a figure that differs and one that is the same must each say so."""
    collection = tiny / "tiny-collection"
    command = f"rkd eval beir {collection} --system bm25 --timed 0 --measure RR@10 --artifacts {tmp_path}"
    name = "BM25 (lucene, k1 0.9, b 0.4)"
    tables = [
        Table("whole", command, (Expected(name, "RR@10", 0.9, 0.1), Expected(name, "RR@10", 0.1, 0.01))),
        Table("broken", f"{command} --split tset", (Expected(name, "RR@10", 0.0, 1.0),)),
    ]
    outcomes = list(reproduce(tables))
    assert [outcome.ok for outcome in outcomes] == [True, False, False]
    assert outcomes[1].found == outcomes[0].found is not None
    assert outcomes[2].found is None
    assert "no split 'tset'" in outcomes[2].problem
    text = outcome_table(outcomes)
    assert "same" in text
    assert "DIFFERS" in text
    assert "no split" in text
