"""Results in other tools' formats, and other tools' rankers in ours."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytrec_eval

from eval import lucene
from eval.lucene import LuceneSystem, java_version, require_pyserini
from eval.measures import evaluate
from eval.results import Facts, SystemResult
from eval.specs import SystemSpec
from eval.suite import Setup, run_suite
from eval.tables import csv_table, latex_table
from retrieval_kd.collections.beir import BeirCollection
from retrieval_kd.errors import DataError
from retrieval_kd.runs import rank, write_qrels, write_trec

QRELS = {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
RUN = {"q1": rank(["d2", "d1"], [2.0, 1.0]), "q2": rank(["d2", "d1"], [1.0, 1.0])}


def _report() -> dict[str, Any]:
    result = SystemResult.of("a, 100 % & more_or {less}", "run", evaluate(RUN, QRELS, ["nDCG@10", "RR@10"]), Facts())
    return {
        "collection": "toy", "split": "test", "documents": 2, "measures": ["nDCG@10", "RR@10"],
        "systems": [result.to_json()],
    }  # fmt: skip


def test_csv_has_every_digit_and_survives_names() -> None:
    """A comma in a name shifts every column after it; three decimals cannot be tested for significance."""
    report = _report()
    (row,) = csv.DictReader(io.StringIO(csv_table(report)))
    assert row["system"] == "a, 100 % & more_or {less}"
    assert float(row["nDCG@10"]) == report["systems"][0]["nDCG@10"]
    assert float(row["RR@10 low"]) == report["systems"][0]["intervals"]["RR@10"][0]
    assert (row["queries"], row["params"]) == ("2", "")


def test_latex_escapes_what_latex_reads() -> None:
    """A per cent sign comments out the rest of the row."""
    text = latex_table(_report())
    assert r"a, 100 \% \& more\_or \{less\}" in text
    assert text.count(r"\\") == 2
    assert "95 \\% bootstrap" in text
    assert text.startswith(r"\begin{table}")
    report = _report()
    report["systems"][0]["name"] = "a^b~c"
    assert r"a\textasciicircum{}b\textasciitilde{}c &" in latex_table(report)


def test_trec_eval_reads_our_run_and_qrels(tmp_path: Path) -> None:
    """A rank from 0 or tied scores change the figures in the very tool that papers cite."""
    write_trec(tmp_path / "run.trec", RUN, "toy")
    write_qrels(tmp_path / "qrels.txt", QRELS)
    with (tmp_path / "run.trec").open() as file:
        run = pytrec_eval.parse_run(file)
    with (tmp_path / "qrels.txt").open() as file:
        qrels = pytrec_eval.parse_qrel(file)
    assert qrels == QRELS
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recip_rank"}).evaluate(run)
    ours = evaluate(RUN, QRELS, ["nDCG@10", "RR"])
    np.testing.assert_allclose(ours.values["nDCG@10"], [theirs[q]["ndcg_cut_10"] for q in QRELS])
    np.testing.assert_allclose(ours.values["RR"], [theirs[q]["recip_rank"] for q in QRELS])
    assert (tmp_path / "run.trec").read_text().splitlines()[0].split()[3] == "1"


def test_pyserini_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own failure is a Java stack trace, or an import error three packages deep."""
    monkeypatch.setattr(sys, "version_info", (3, 11, 2))
    with pytest.raises(DataError, match=r"needs Python 3\.12 and Java 21, this is Python 3\.11"):
        require_pyserini()
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(lucene, "java_version", lambda: None)
    with pytest.raises(DataError, match="here is no Java"):
        require_pyserini()
    monkeypatch.setattr(lucene, "java_version", lambda: 17)
    with pytest.raises(DataError, match="needs Java 21, here is Java 17"):
        require_pyserini()
    monkeypatch.setattr(lucene, "java_version", lambda: 21)
    monkeypatch.setitem(sys.modules, "pyserini", None)
    with pytest.raises(DataError, match="pyserini is not installed"):
        require_pyserini()


@pytest.mark.parametrize(
    ("said", "expected"),
    [('openjdk version "21.0.4" 2024-07-16', 21), ('java version "1.8.0_402"', 8), ("zsh: not found", None)],
)
def test_java_versions_are_read(monkeypatch: pytest.MonkeyPatch, said: str, expected: int | None) -> None:
    """Java 8 calls itself 1.8."""
    monkeypatch.setattr(lucene.subprocess, "run", lambda *_, **__: SimpleNamespace(stderr=said))
    assert java_version() == expected


@pytest.fixture
def toy(tmp_path: Path) -> BeirCollection:
    """Return a collection of the searcher's two documents."""
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    for name, ids in (("corpus", ("d1", "d2")), ("queries", ("q1", "q2"))):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"_id": "{key}", "text": "words"}}\n' for key in ids))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    return BeirCollection(folder)


class _Searcher:
    """A LuceneSearcher that ranks two documents, with a tie."""

    def __init__(self, index: str) -> None:
        self.parameters = (0.0, 0.0)

    @classmethod
    def from_prebuilt_index(cls, name: str) -> _Searcher | None:
        return cls(name) if name == "beir-v1.0.0-scifact.flat" else None

    def set_bm25(self, k1: float, b: float) -> None:
        self.parameters = (k1, b)

    def search(self, text: str, k: int) -> list[Any]:
        return [SimpleNamespace(docid=doc_id, score=1.0) for doc_id in ("d2", "d1")][:k]

    def batch_search(self, queries: list[str], qids: list[str], k: int, threads: int) -> dict[str, list[Any]]:
        return {query_id: self.search(text, k) for query_id, text in zip(qids, queries, strict=True)}


@pytest.fixture
def pyserini(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a searcher of two documents where pyserini's would be."""
    monkeypatch.setattr(lucene, "require_pyserini", lambda: None)
    module = ModuleType("pyserini.search.lucene")
    module.LuceneSearcher = _Searcher  # type: ignore[attr-defined]
    for name in ("pyserini", "pyserini.search"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "pyserini.search.lucene", module)


@pytest.mark.usefixtures("pyserini")
def test_pyserinis_hits_become_a_run(toy: BeirCollection) -> None:
    """Lucene breaks ties by its own numbers: here the id decides, as for every other system."""
    system = LuceneSystem("beir-v1.0.0-scifact.flat", toy, k1=0.9, b=0.4)
    assert system.run({"q": "text"}, 5)["q"].doc_ids == ("d1", "d2")
    assert system.facts({"q": "text"}, 5).query_ms_p50 is not None
    assert system.name == "BM25 (Anserini, beir-v1.0.0-scifact.flat, k1 0.9, b 0.4)"
    with pytest.raises(DataError, match="'scifcat' is neither a folder nor a prebuilt index"):
        LuceneSystem("scifcat", toy)


@pytest.mark.usefixtures("pyserini")
def test_pyserini_takes_a_name_and_refuses_another_corpus(tiny: Path, toy: BeirCollection, tmp_path: Path) -> None:
    """A name in a command must reach the table; an index of other documents scores zero and looks like bad BM25."""
    spec = [SystemSpec.parse("lucene=pyserini:beir-v1.0.0-scifact.flat")]
    (report,) = run_suite([str(tmp_path / "toy")], spec, Setup(timed=0), tmp_path / "cache", tmp_path / "out", "rkd")
    assert [system["name"] for system in report["systems"]] == ["lucene"]
    with pytest.raises(DataError, match="'d1', which tiny-collection does not have"):
        LuceneSystem("beir-v1.0.0-scifact.flat", BeirCollection(tiny / "tiny-collection")).run(toy.queries(), 5)


def test_beir_folders_and_trec_qrels_say_the_same(tmp_path: Path, tiny: Path) -> None:
    """A qrels file without the second column is read by trec_eval as another one."""
    qrels = BeirCollection(tiny / "tiny-collection").qrels("test")
    write_qrels(tmp_path / "qrels.txt", qrels)
    with (tmp_path / "qrels.txt").open() as file:
        assert pytrec_eval.parse_qrel(file) == {query: dict(grades) for query, grades in qrels.items()}
