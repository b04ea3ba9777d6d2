"""Cost is measured where it arises: from the arrival of a request, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from eval.bench import Load, _cost_and_quality, _cpu_seconds, _status_bytes, bench
from eval.fusion import FusedSystem
from eval.open_loop import open_loop
from eval.results import Facts
from eval.specs import SystemSpec
from eval.suite import Setup, run_suite
from eval.systems import BM25System, RerankSystem, RunSystem, ScoredRerank
from eval.tables import format_costs
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import split_queries
from retrieval_kd.encoders.base import Vectors
from retrieval_kd.errors import DataError, ServeError
from retrieval_kd.recipes.schema import CollectionSpec


def test_waiting_counts_from_the_arrival() -> None:
    """A closed loop would wait for the slow answer and then find the others fast (coordinated omission)."""
    service, seconds = 0.02, 0.5
    found = open_loop(lambda _: time.sleep(service), [1, 2, 3], rate=100, seconds=seconds, seed=1, workers=1)
    assert found.latency is not None
    assert found.failed == 0
    # Bounds that a machine of any speed keeps: one worker answers one after another, none faster than it sleeps,
    # and the last request arrived within the time.
    assert found.sent > 1.5 * seconds / service
    assert found.latency.max_ms >= 1e3 * (found.sent * service - seconds)
    assert found.latency.p50_ms > 3e3 * service
    assert found.answered_per_s <= 1 / service


def test_refused_requests_are_counted_and_not_timed() -> None:
    """A server that refuses quickly would otherwise look fast."""

    def refuse(value: int) -> None:
        if value == 0:
            raise ServeError("too busy")

    found = open_loop(refuse, [0, 1], rate=200, seconds=0.3, seed=0)
    assert found.latency is not None
    assert found.failed == -(-found.sent // 2)
    assert found.latency.calls == found.sent - found.failed
    assert open_loop(refuse, [0], rate=200, seconds=0.1, seed=0).latency is None
    for rate, seconds in ((0, 1), (1, 0), (1e-9, 1)):
        with pytest.raises(DataError, match="open loop"):
            open_loop(refuse, [1], rate=rate, seconds=seconds, seed=0)


def test_a_servers_cost_is_that_of_its_workers_too() -> None:
    """Without it the supervisor of several workers, which encodes nothing, would make serving look free."""
    worker = "import sys; used = bytearray(64 * 2**20); print(flush=True); sys.stdin.read()"
    busy = f"import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n{worker}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdout.readline()
        cpu, memory, peak = (
            _cpu_seconds(server.pid),
            _status_bytes(server.pid, "VmRSS"),
            _status_bytes(server.pid, "VmHWM"),
        )
        server.stdin.close()
    assert cpu is not None
    assert cpu >= 0.25
    assert memory is not None
    assert peak is not None
    assert 64 * 2**20 < memory <= peak
    assert _cpu_seconds(server.pid) is None
    assert _status_bytes(server.pid, "VmRSS") is None


def test_every_system_has_its_cost_beside_its_quality(tiny: Path, tmp_path: Path) -> None:
    """Memory of two systems in one process could not be told apart; quality of another run would not be its own."""
    specs = [SystemSpec("bm25"), SystemSpec("model", str(tiny / "tiny-encoder"), "dense")]
    core = min(os.sched_getaffinity(0))
    load = Load(calls=12, warmup=2, depth=10, cores=(core,))
    collection = str(tiny / "tiny-collection")
    report = bench(collection, "test", specs, load, ["nDCG@10"], tmp_path / "cache", tmp_path / "out", "rkd eval bench")
    report = json.loads(json.dumps(report))
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    bm25, dense = report["systems"]
    assert set(bm25["cost"]["stages"]) == {"total"}
    assert set(dense["cost"]["stages"]) == {"total", "encode", "search"}
    for entry in (bm25, dense):
        cost = entry["cost"]
        assert cost["cores"] == [core]
        total = cost["stages"]["total"]
        assert total["calls"] == 12
        assert total["p50_ms"] <= total["p95_ms"] <= total["p99_ms"] <= total["max_ms"]
        assert cost["queries_per_s"] > 0
        assert cost["build_s"] > 0
        assert 0 < cost["memory_bytes"] <= cost["peak_bytes"]
        assert entry["nDCG@10"] > 0
    # torch alone is hundreds of megabytes, which BM25's process does not have.
    assert dense["cost"]["memory_bytes"] > bm25["cost"]["memory_bytes"] + 50e6
    assert dense["cost"]["documents_per_s"] > 0
    assert bm25["cost"]["documents_per_s"] is None
    text = format_costs(report)
    assert "CPU s/1000" in text
    assert text.index("encode") < text.index("search") < text.index("total", text.index("search"))
    assert "encode" in text


def test_bench_and_evaluation_measure_alike_without_self_matches(tiny: Path, tmp_path: Path) -> None:
    """With the query's own text at rank 1, with distractors or beside a cost, every figure of ArguAna is too low."""
    folder = tmp_path / "arguana"
    (folder / "qrels").mkdir(parents=True)
    texts = {"q1": "cats purr softly", "a1": "cats purr", "q2": "dogs bark loudly", "a2": "dogs bark"}
    rows = [json.dumps({"_id": doc_id, "title": "", "text": text}) for doc_id, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "queries.jsonl").write_text("\n".join(rows[::2]) + "\n")
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta1\t1\nq2\ta2\t1\n")
    (tmp_path / "other.trec").write_text("q1 Q0 a1 1 1.0 t\nq2 Q0 a2 1 1.0 t\n")
    others = (str(tiny / "tiny-collection"),)
    systems, measures = [SystemSpec("bm25"), SystemSpec("run", str(tmp_path / "other.trec"))], ("nDCG@1",)
    setup = Setup(measures=measures, depth=2, distractors=others, timed=0, teacher="run")
    (report,) = run_suite([str(folder)], systems, setup, tmp_path / "cache", tmp_path / "suite", "rkd")
    benched = bench(
        str(folder), "test", systems[:1], Load(calls=1, warmup=0, depth=2), measures, tmp_path / "cache",
        tmp_path / "bench", "rkd", others,
    )  # fmt: skip
    assert report["systems"][0]["nDCG@1"] == benched["systems"][0]["nDCG@1"] == 1.0
    assert report["notes"] == benched["notes"] != []
    assert report["agreements"][0]["top1"] == 1.0


def test_a_reranker_pays_for_its_scoring_and_stored_runs_for_nothing(tiny: Path) -> None:
    """A cross-encoder whose stored scores are looked up would be the fastest system of the table."""
    collection = open_collection(CollectionSpec(str(tiny / "tiny-collection")))
    queries = split_queries(collection, "test")
    load = Load(calls=2, warmup=1, depth=3)
    first = BM25System(collection).run(queries, load.depth)
    teacher = CountingTeacher()
    bm25 = RunSystem("bm25", first)
    reranker = ScoredRerank("ce", first, RerankSystem("ce", bm25, teacher, collection, 3))
    cost, run, facts = _cost_and_quality(reranker, queries, collection, load)
    assert cost is not None
    # Warm-up, facts, single queries and throughput each score the sample, and nothing scores the other queries.
    assert teacher.pairs >= 3 * 3
    assert {query_id: list(one.doc_ids) for query_id, one in run.items()} == {
        query_id: list(one.doc_ids) for query_id, one in first.items()
    }
    assert facts.params == teacher.parameters
    for stored in (bm25, FusedSystem("both", [first, first]), ScoredRerank("mean", first, None)):
        cost, run, facts = _cost_and_quality(stored, queries, collection, load)
        assert cost is None
        assert facts == Facts()
        assert set(run) == set(queries)


class CountingTeacher:
    """Scores every pair alike and counts them."""

    name, fingerprint, parameters = "counting", "0" * 64, 7

    def __init__(self) -> None:
        self.pairs = 0

    def score(self, pairs: Sequence[tuple[str, str]], on_rows: Callable[[int], object] | None = None) -> Vectors:
        self.pairs += len(pairs)
        return np.zeros(len(pairs), dtype=np.float32)


def test_a_failing_process_says_why(tiny: Path, tmp_path: Path) -> None:
    """An exit status alone sends a person to read code."""
    specs = [SystemSpec("run", "nowhere.trec")]
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"bench of run:nowhere\.trec: nowhere\.trec: cannot read") as error:
        bench(str(tiny / "tiny-collection"), "test", specs, Load(calls=1), ["RR@10"], tmp_path / "cache", out, "")
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_a_core_that_is_not_there_is_refused_before_anything_runs(tiny: Path, tmp_path: Path) -> None:
    """Without it the system's process would end in a trace about arguments that nobody gave."""
    load = Load(calls=1, cores=(9999,))
    with pytest.raises(DataError, match=r"--core 9999: this process may run on \d+"):
        bench(
            str(tiny / "tiny-collection"),
            "test",
            [SystemSpec("bm25")],
            load,
            ["RR@10"],
            tmp_path / "cache",
            tmp_path / "out",
            "",
        )
