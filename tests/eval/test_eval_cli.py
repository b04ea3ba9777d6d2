"""The verbs of ``rkd eval`` as typed: what they print, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_collection_folder
from typer.testing import CliRunner

from retrieval_kd.cli.main import app
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.errors import DataError, QualityError


def rkd(*words: object) -> str:
    """Run a command in this process and return what it printed on standard output."""
    return CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def report(tiny: Path) -> Path:
    """Measure BM25 twice under two names on the tiny collection."""
    out = tiny / "cli-report"
    rkd(
        "beir", tiny / "tiny-collection", "--system", "one=bm25", "--system", "two=rrf:one+three", "--system",
        "three=bm25", "--timed", "0", "--artifacts", tiny / "cli-artifacts", "--out", out,
    )  # fmt: skip
    return out


def test_a_deep_measure_has_its_depth(tiny: Path, tmp_path: Path) -> None:
    """R@200 over the usual 100 documents is R@100 under another name."""
    words = ("beir", tiny / "tiny-collection", "--bm25", "--measure", "R@200", "--timed", 0, "--artifacts", tmp_path)
    assert "R@200" in rkd(*words)
    with pytest.raises(DataError, match="'R@200' needs 200 documents a query, 100 are retrieved"):
        rkd(*words, "--depth", 100)


def test_compare_prints_tests_and_queries(tiny: Path, report: Path) -> None:
    """A person must see the queries, a machine the numbers."""
    files = [report / "per_query" / f"{name}.tsv" for name in ("one", "two")]
    text = rkd("compare", *files, "--measure", "RR@10", "--collection", tiny / "tiny-collection")
    assert "RR@10 against one" in text
    assert "12 paired queries" in text
    assert "Largest wins of two in RR@10: " in text
    found = json.loads(rkd("compare", report, "--json"))
    assert {row["system"] for row in found["comparisons"]} == {"two", "three"}
    with pytest.raises(DataError, match="no measure 'RR@1'"):
        rkd("compare", *files, "--measure", "RR@1")


def test_compare_reads_the_texts_of_distractors_too(tiny: Path, tmp_path: Path) -> None:
    """A report made with distractors ranks ids that the collection alone does not have."""
    base, other = tiny / "tiny-collection", tiny_collection_folder(tmp_path / "other", seed=5)
    runs = ("near", "far")
    first = next(iter(BeirCollection(other).documents())).doc_id
    query_id, grades = next(iter(BeirCollection(base).qrels("test").items()))
    (tmp_path / "near.trec").write_text(f"{query_id} Q0 {max(grades, key=lambda d: grades[d])} 1 1.0 t\n")
    (tmp_path / "far.trec").write_text(f"{query_id} Q0 other:{first} 1 1.0 t\n")
    systems = [word for name in runs for word in ("--system", f"{name}=run:{tmp_path / name}.trec")]
    rkd("beir", base, "--distractors", other, *systems, "--artifacts", tmp_path / "cache", "--out", tmp_path / "out")
    files = [tmp_path / "out" / "per_query" / f"{name}.tsv" for name in runs]
    text = rkd("compare", *files, "--collection", base, "--distractors", other)
    assert f"other:{first}" in text
    with pytest.raises(DataError, match="name it with --collection"):
        rkd("compare", *files, "--distractors", other)


@pytest.mark.parametrize(
    ("style", "part"), [("text", "one  "), ("markdown", "| one |"), ("csv", ",one,bm25,"), ("latex", r"\toprule")]
)
def test_a_report_in_each_format(report: Path, style: str, part: str) -> None:
    """A paper, a spreadsheet and a README each want another one."""
    assert part in rkd("report", report, "--format", style)


def test_reproduce_fails_where_a_figure_differs(tiny: Path, tmp_path: Path) -> None:
    """A build that stays green over a changed figure reproduces nothing."""
    tables = tmp_path / "tables.yaml"
    expected = "{system: one, measure: RR@10, value: %s, tolerance: 0.6}"
    command = f"rkd eval beir {{data}} --system one=bm25 --timed 0 --artifacts {tmp_path}"
    text = f"- name: t\n  command: {command}\n  expect: [{expected}]\n"
    tables.write_text(text % "0.5")
    arguments = ("reproduce", tables, "--set", f"data={tiny / 'tiny-collection'}")
    assert "same" in rkd(*arguments)
    tables.write_text(text % "7")
    with pytest.raises(QualityError, match="1 of 1 figures were not reproduced"):
        rkd(*arguments)
    with pytest.raises(DataError, match="no table 'u'"):
        rkd(*arguments, "--only", "u")
    for wrong in ("data", "data=", "=x"):
        with pytest.raises(DataError, match=f"--set '{wrong}': write KEY=VALUE"):
            rkd("reproduce", tables, "--set", wrong)
