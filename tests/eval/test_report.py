"""The report says what was measured, keeps what it was measured from, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from eval import formats
from eval.curves import AGREEMENT, DIAGNOSTICS, read_curves
from eval.fidelity import Fidelity, agreement_entry
from eval.measures import evaluate
from eval.page import render_page, report_plots
from eval.reference import reference_rows
from eval.report import merge_reports, write_report
from eval.results import Facts, SystemResult
from eval.tables import format_table, markdown_table, plain_table
from retrieval_kd.errors import DataError
from retrieval_kd.runs import rank, read_trec
from retrieval_kd.training.metrics import MEANS

MEASURES = ("nDCG@10", "RR@10", "R@100")
QRELS = {f"q{number}": {"d0": 1} for number in range(12)}
UNTIMED = Facts()


def _system(name: str, role: str, position: int, facts: Facts = UNTIMED, missing: int = 0) -> SystemResult:
    ids = [f"d{number}" for number in range(1, 6)]
    ids.insert(position, "d0")
    run = {query_id: rank(ids, np.arange(6, 0, -1)) for query_id in list(QRELS)[missing:]}
    return SystemResult.of(name, role, evaluate(run, QRELS, MEASURES), facts, run)


@pytest.fixture
def systems() -> list[SystemResult]:
    return [
        _system("BM25", "bm25", 2, missing=3),
        _system("teacher encoder", "bi-encoder", 0, Facts(22_713_216, 8.0, 9.0, 12.0, 1536.0)),
        _system("student <3 layers>", "student", 1, Facts(17_389_824, 4.0, 5.0, 6.0, 1536.0)),
    ]


def _write(folder: Path, systems: list[SystemResult], **extra: Any) -> dict[str, Any]:
    return write_report(folder, collection="toy", split="test", systems=systems, documents=6, **extra)


def test_report_json_has_the_contract_keys(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Other programs read these keys; absent cost is null and never 0."""
    returned = _write(tmp_path, systems, baseline="teacher encoder", notes=["a note"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    assert (report["collection"], report["split"], report["measures"]) == ("toy", "test", list(MEASURES))
    keys = {"name", "role", *MEASURES, "queries", "params", "encode_ms_p50", "bytes_per_doc"}
    for entry in report["systems"]:
        assert keys <= set(entry)
    bm25 = report["systems"][0]
    assert (bm25["params"], bm25["encode_ms_p50"], bm25["bytes_per_doc"]) == (None, None, None)
    assert bm25["RR@10"] == pytest.approx(9 / 12 / 3)
    assert (bm25["queries"], bm25["queries_without_results"]) == (12, 3)
    assert {row["system"] for row in report["comparisons"]} == {"BM25", "student <3 layers>"}
    assert len(report["comparisons"]) == 2 * len(MEASURES)
    assert {"versions", "hardware"} <= set(report["provenance"])


def test_runs_and_per_query_values_give_the_means_back(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Anyone must be able to score our runs with another tool and get our numbers."""
    report = _write(tmp_path, systems)
    files = ("bm25", "teacher-encoder", "student-3-layers")
    for slug, entry in zip(files, report["systems"], strict=True):
        means = evaluate(read_trec(tmp_path / f"runs/{slug}.trec"), QRELS, MEASURES).means
        header, *rows = (tmp_path / f"per_query/{slug}.tsv").read_text().splitlines()
        assert header.split("\t") == ["query_id", *MEASURES]
        assert [row.split("\t")[0] for row in rows] == list(QRELS)
        for column, measure in enumerate(MEASURES, start=1):
            assert means[measure] == entry[measure]
            assert np.mean([float(row.split("\t")[column]) for row in rows]) == pytest.approx(entry[measure])


def test_two_reports_of_the_same_results_are_the_same(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Intervals and p-values are seeded: a second run must not change the page."""
    for name in ("one", "two"):
        _write(tmp_path / name, systems, baseline="teacher encoder")
    assert (tmp_path / "one/report.html").read_bytes() == (tmp_path / "two/report.html").read_bytes()


def test_names_that_share_a_file_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """'A b' and 'a-b' are two systems."""
    _write(tmp_path, [_system("A b", "student", 0), _system("a-b", "student", 1)])
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a-b-2.trec", "a-b.trec"]


class _Page(HTMLParser):
    """Checks nesting and collects what would reach the network."""

    void = frozenset({"meta", "br", "circle", "path", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_page_is_self_contained_and_accessible(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Opened from a mail or a build server it must show the same, to everyone."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        "".join(json.dumps({"event": "train", "step": step, "loss": 1 / step}) + "\n" for step in range(1, 50))
        + json.dumps({"event": "dev", "step": 49, "nDCG@10": 0.5})
        + "\n"
    )
    _write(
        tmp_path, systems, baseline="teacher encoder", training={"student": metrics}, provenance={"command": "rkd run"}
    )
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|<script|@import|url\(|<link|<img|<iframe", html)
    page = _page(html)
    by_tag: dict[str, list[dict[str, str | None]]] = {}
    for tag, attributes in page.tags:
        by_tag.setdefault(tag, []).append(attributes)
    assert by_tag["html"][0]["lang"] == "en"
    assert all(attributes.get("scope") in ("row", "col") for attributes in by_tag["th"])
    assert len(by_tag["svg"]) == 10
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in by_tag["svg"])
    assert "student <3 layers>" in page.text
    assert "<3 layers>" not in html


def test_page_names_what_every_number_is_of(tmp_path: Path, systems: list[SystemResult]) -> None:
    """A number without collection, split and queries is quoted wrongly sooner or later."""
    _write(tmp_path, systems, baseline="teacher encoder", notes=["The teacher is <b>weak</b>."])
    text = " ".join(_page((tmp_path / "report.html").read_text()).text.split())
    assert "toy, split test: means over all 12 judged queries over 6 documents" in text
    assert "BM25 returned nothing for 3 of 12 queries; they count as zero." in text
    assert "The teacher is <b>weak</b>." in text
    assert "student <3 layers> reaches 63.1 % of teacher encoder's nDCG@10" in text
    assert "Not timed: BM25" in text


def test_page_renders_without_anything_optional(tmp_path: Path) -> None:
    """One untimed system, no training, no baseline: no empty sections, no crash."""
    report = _write(tmp_path, [_system("run", "run", 0)])
    html = render_page(json.loads(json.dumps(report)))
    assert "<svg" not in html
    assert "Differences" not in html
    _page(html)


def test_report_refuses_rows_that_do_not_belong_in_one_table(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Nothing is written when the rows cannot be compared."""
    other = {f"x{number}": {"d0": 1} for number in range(12)}
    stranger = SystemResult.of("stranger", "run", evaluate({}, other, MEASURES))
    fewer = SystemResult.of("fewer", "run", evaluate({}, QRELS, MEASURES[:1]))
    for rows, message in (
        ([], "at least one system"),
        ([systems[0], systems[0]], "two systems are called 'BM25'"),
        ([systems[0], stranger], "query 'q0' is in only one"),
        ([systems[0], fewer], "measured on nDCG@10, 'BM25' on"),
    ):
        with pytest.raises(DataError, match=message):
            _write(tmp_path / "report", rows)
    with pytest.raises(DataError, match="did you mean 'BM25'"):
        _write(tmp_path / "report", systems, baseline="BM52")
    assert not (tmp_path / "report").exists()


def test_merged_reports_lose_no_row_and_no_test(tmp_path: Path) -> None:
    """Two students called 'mine' are two rows; the second must not vanish behind the first, nor its tests."""
    bm25 = _system("BM25", "bm25", 2)
    for name, position in (("one", 0), ("two", 1)):
        _write(tmp_path / name, [bm25, _system("mine", "student", position)], baseline="BM25", notes=["same"])
    folders = [tmp_path / "one", tmp_path / "two"]
    merged = merge_reports(folders)
    mine = [f"mine ({folder})" for folder in folders]
    assert [system["name"] for system in merged["systems"]] == ["BM25", *mine]
    assert [(row["system"], row["baseline"]) for row in merged["comparisons"][:: len(MEASURES)]] == [
        (mine[0], "BM25"), (mine[1], "BM25"),
    ]  # fmt: skip
    assert set(merged["per_query"]) == {"BM25", *mine}
    assert merged["notes"] == ["same"]
    assert [system["name"] for system in merge_reports(folders[:1] * 2)["systems"]] == ["BM25", "mine"]


def test_reports_of_changed_files_are_not_merged(tmp_path: Path) -> None:
    """A corpus of the same name and size with other texts gives figures that only look comparable."""
    for name in ("a", "b"):
        _write(tmp_path / name, [_system("BM25", "bm25", 0)], provenance={"collection": name * 64})
    with pytest.raises(
        DataError, match=r"had other content than in .*a \(fingerprints bbbbbbbbbbbb and aaaaaaaaaaaa\)"
    ):
        merge_reports([tmp_path / "a", tmp_path / "b"])


def test_tables_for_people_carry_interval_and_dash(tmp_path: Path, systems: list[SystemResult]) -> None:
    """A table without intervals invites ranking noise; a cost that was not measured is a dash."""
    report = _write(tmp_path, systems)
    plain = format_table(systems)
    assert "1.000 ±0.000" in plain
    assert "17.4 M" in plain
    lines = markdown_table(report).splitlines()
    assert lines[0] == "| system | nDCG@10 | RR@10 | R@100 | parameters | encode ms | query ms | bytes/doc |"
    assert lines[2].startswith("| BM25 | 0.375 (")
    assert lines[2].endswith("| – | – | – | – |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "12 judged queries" in lines[-1]


def test_curves_average_down_and_keep_the_last_of_a_repeated_step(tmp_path: Path) -> None:
    """A resumed run logs steps twice; thousands of points make the page heavy."""
    path = tmp_path / "metrics.jsonl"
    events = [{"event": "train", "step": step, "loss": 9.0} for step in range(1, 1001)]
    events += [{"event": "train", "step": step, "loss": 2.0} for step in range(1, 1001)]
    events += [{"event": "dev", "step": 10, "nDCG@10": 0.25}, {"event": "start"}]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    curves = read_curves(path)
    assert len(curves["loss"]) <= 400
    assert {value for _, value in curves["loss"]} == {2.0}
    assert curves["loss"][-1][0] == 1000
    assert curves["dev"] == [(10.0, 0.25)]


def test_imitation_and_quality_are_told_apart(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Without it a student that follows its teacher ever closer and ranks ever worse looks well trained."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("new", "old")}
    steps = [
        {"event": "train", "step": step, "loss": 1.0, **{key: i + step / 1000 for i, key in enumerate(DIAGNOSTICS)}}
        for step in range(1, 1001)
    ]
    # fp16 left a step out, and a resumed run logged it again; lists without an order have no tau.
    steps += [{**steps[-1], "gradient_norm": None}, {**steps[0], "agreement_kendall": None}]
    steps += [{"event": "dev", "step": step, "nDCG@10": 0.5 - step / 4000} for step in (0, 500, 1000)]
    paths["new"].write_text("".join(json.dumps(event) + "\n" for event in steps))
    paths["old"].write_text('{"event": "train", "step": 1, "loss": 1.0}\n')
    report = _write(tmp_path, systems, training=paths)
    told, silent = report["training"]["new"], report["training"]["old"]
    for i, key in enumerate(AGREEMENT):
        assert 300 < len(told[key]) <= 400
        assert told[key][-1] == pytest.approx((1000, i + 1.0), abs=2e-3)
        assert silent[key] == []
    assert silent["diagnostics"] == {}
    assert set(told["diagnostics"]) == set(DIAGNOSTICS)
    assert told["diagnostics"]["padding"] == pytest.approx({"mean": 6.5005, "last": 6.9505})
    assert told["diagnostics"]["gradient_norm"] == pytest.approx({"mean": 5.5, "last": 5.9495})
    drawn = {plot.slug for plot in report_plots(report)}
    assert drawn == {
        "quality-latency", "training-loss", "training-dev",
        "training-agreement-top1", "training-agreement-kendall", "training-agreement-kl",
    }  # fmt: skip
    text = _page((tmp_path / "report.html").read_text()).text
    assert "a student may imitate better and rank worse on dev" in text
    for key, found in told["diagnostics"].items():
        write = formats.quality if key in AGREEMENT else formats.milliseconds
        assert write(found["last"]) + write(found["mean"]) in text, key
    for curve in report["training"].values():
        for key in ("diagnostics", *AGREEMENT):
            curve.pop(key)
    older = _page(render_page(report)).text
    assert "Quality on dev" in older
    assert "Diagnostics" not in older


def test_the_report_leaves_out_no_diagnostic_that_training_logs() -> None:
    """Without it a diagnostic added to the log would be looked for in the report in vain."""
    assert {*MEANS, "texts_per_second"} == {"loss", *DIAGNOSTICS}


@pytest.mark.parametrize(
    "line", ["{", '{"event": "train", "step": 1}', "[]", '{"event": "dev", "step": "x", "nDCG@10": 1}']
)
def test_a_bad_metrics_line_is_named(tmp_path: Path, line: str) -> None:
    """A torn file must not draw a shorter curve."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "train", "step": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a metrics event"):
        read_curves(path)


def test_plots_lie_beside_the_report_as_pictures(tmp_path: Path, systems: list[SystemResult]) -> None:
    """A picture for a README must open without the page: its own size, name space and colours."""
    _write(tmp_path, systems, baseline="teacher encoder")
    files = {path.name: path for path in (tmp_path / "plots").iterdir()}
    assert set(files) == {"quality-latency.svg", "quality-latency.png", "queries-1.svg", "queries-2.svg"}
    assert files["quality-latency.png"].read_bytes().startswith(b"\x89PNG")
    root = ElementTree.fromstring(files["queries-1.svg"].read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (root.get("width"), root.get("height")) == ("420", "320")
    assert "--accent:#0b6e63" in files["quality-latency.svg"].read_text()


def test_cost_agreement_and_published_figures_have_their_sections(tmp_path: Path, systems: list[SystemResult]) -> None:
    """A section that is written and not shown, or shown empty, misleads."""
    times = {"calls": 5, "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0, "max_ms": 4.0}
    cost = {
        "stages": {"total": times, "encode": times}, "queries_per_s": 120.0, "cpu_s_per_1000": 8.0,
        "memory_bytes": 250e6, "peak_bytes": 300e6, "build_s": 2.0, "documents_per_s": None, "open_loop": None,
        "cores": [0],
    }  # fmt: skip
    systems[2] = replace(systems[2], cost=cost)
    entry = agreement_entry(
        "student <3 layers>", "teacher encoder", Fidelity(12, 10, 0.5, 0.6, 0.7, 0.8, 0.1, 12), None
    )
    rows = reference_rows("scifact", "test", ("nDCG@10",))
    report = _write(tmp_path, systems, baseline="teacher encoder", agreements=[entry], reference=rows)
    html = (tmp_path / "report.html").read_text()
    text = _page(html).text
    for heading in ("Cost", "Agreement with teacher encoder", "Published figures", "Query by query"):
        assert heading in text
    assert "Not known: BM25, teacher encoder" in text
    assert "github.com/embeddings-benchmark/results" in text
    # Twelve of twelve queries are worse, so both differ from the baseline significantly.
    assert text.count("▼") >= 4
    assert (tmp_path / "plots/quality-memory.png").exists()
    for section in ("agreements", "reference", "per_query"):
        report.pop(section)
    older = render_page({**report, "systems": [{k: v for k, v in s.items() if k != "cost"} for s in report["systems"]]})
    assert not any(heading in older for heading in (">Cost<", "Published figures", "Query by query"))


@pytest.mark.parametrize("milliseconds", [1e-3, 0.0447, 0.1, 1.0, 7.3, 1e4])
def test_a_lone_system_has_its_pictures(tmp_path: Path, milliseconds: float) -> None:
    """Without it the limits around a single cost could have no width, and the report would end in a warning's trace."""
    cost = Facts(query_ms_p50=milliseconds, query_ms_p95=milliseconds)
    _write(tmp_path, [_system("BM25", "bm25", 0, cost)])
    assert (tmp_path / "plots" / "quality-latency.png").stat().st_size > 0


def test_a_report_replaces_the_one_before_it(tmp_path: Path, systems: list[SystemResult]) -> None:
    """Systems left from an earlier report were compared, and the p-values of the new ones corrected for them."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "train", "step": 1, "loss": 1.0}\n{"event": "train", "step": 2, "loss": 0.5}\n')
    out = tmp_path / "out"
    _write(out, systems, baseline="teacher encoder", training={"student <3 layers>": metrics})
    assert (out / "plots/training-loss.svg").exists()
    mine = [out / "runs/mine.trec", out / "per_query/mine.tsv", out / "plots/mine.svg", out / "notes.txt"]
    for path in mine:
        path.write_text("mine\n")
    _write(out, [systems[0], _system("A b", "student", 1)])
    kept = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path not in mine}
    assert kept == {
        "report.json", "report.html", "runs/bm25.trec", "runs/a-b.trec", "per_query/bm25.tsv", "per_query/a-b.tsv",
    }  # fmt: skip
    assert all(path.exists() for path in mine)
    (out / "report.json").write_text("{}")
    _write(out, [systems[0]])
    assert (out / "runs/a-b.trec").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: [], "it holds no object"),
        (lambda report: None, "it holds no object"),
        (lambda report: {}, "there is no 'collection'"),
        (lambda report: {**report, "format_version": 99}, "format_version is 99, known is 1"),
        (lambda report: {k: v for k, v in report.items() if k != "training"}, "there is no 'training'"),
        (lambda report: {**report, "documents": "x"}, "'documents' is 'x'"),
        (lambda report: {**report, "systems": []}, "no systems"),
        (lambda report: {**report, "measures": [1]}, "no measures"),
        (lambda report: {**report, "systems": [1]}, "in system 1 there is no object"),
        (lambda report: {**report, "measures": ["AP"]}, "in system 1 there is no 'AP'"),
        (lambda report: {**report, "systems": [{**report["systems"][0], "intervals": {}}]}, "no 'nDCG@10'"),
        (lambda report: {**report, "comparisons": [{}]}, "in comparisons 1 there is no 'system'"),
    ],
)
def test_what_is_no_report_is_one_line(
    tmp_path: Path, systems: list[SystemResult], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """Another program's report.json, or one of a later version, must be named and not end in a trace."""
    report = _write(tmp_path, systems, baseline="BM25")
    assert merge_reports([tmp_path])["systems"] == report["systems"]
    (tmp_path / "report.json").write_text(json.dumps(change(report)))
    with pytest.raises(DataError, match=rf"report\.json: not a report this version can read: .*{message}") as error:
        merge_reports([tmp_path])
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_no_report(tmp_path: Path) -> None:
    """A file in another encoding ended in a trace."""
    (tmp_path / "report.json").write_bytes(b'{"collection": "\xe9"}')
    with pytest.raises(DataError, match=r"report\.json: cannot read the report \(.*utf-8.*\); give a run's folder"):
        merge_reports([tmp_path])


def test_names_are_shown_as_they_are() -> None:
    """Rich would take [v1] and :bug: for markup, so that two systems get one name, and [/b] would end the command."""
    names = ["bm25[k1=0.9]", ":bug:", "big[/b]"]
    table = plain_table(["system[v2]", "nDCG@10"], [[name, "0.5"] for name in names])
    assert [line.split()[0] for line in table.splitlines() if "0.5" in line] == names
    assert "system[v2]" in table
