"""Published figures stand only beside the same collection, and are averaged only over the same sets."""

from __future__ import annotations

import pytest

from eval.measures import parse_measure
from eval.reference import _GROUPS, published, reference_means, reference_rows


def test_every_figure_is_one_and_has_a_source() -> None:
    """A mistyped row would be quoted for years."""
    rows = published()
    assert len(rows) > 400
    keys = [(row.collection, row.split, row.measure, row.system, row.source) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert 0 < row.value < 1
        assert row.source.startswith("https://")
        assert row.system == row.system.strip() != ""
        parse_measure(row.measure)


@pytest.mark.parametrize(
    ("collection", "system", "value"),
    [
        ("scifact", "all-MiniLM-L6-v2", 0.6451),
        ("NFCorpus", "all-MiniLM-L6-v2", 0.3159),
        ("irds:beir/scifact/test", "BM25 (Anserini, flat)", 0.6789),
        ("nfcorpus", "BM25 (Anserini, flat)", 0.3218),
        ("scifact", "mdbr-leaf-ir, symmetric", 0.7056),
    ],
)
def test_known_figures(collection: str, system: str, value: float) -> None:
    """A shifted column gives every system its neighbour's figure."""
    rows = reference_rows(collection, "test", ("nDCG@10",))
    assert [row["value"] for row in rows if row["system"] == system] == [value]


@pytest.mark.parametrize(
    ("collection", "split"), [("scifact+msmarco-12k", "test"), ("scifact", "train"), ("msmarco-12k", "dev")]
)
def test_another_corpus_or_split_has_no_published_figures(collection: str, split: str) -> None:
    """With distractors or on another split the task is another one."""
    assert reference_rows(collection, split, ("nDCG@10", "RR@10")) == []


def test_a_mean_needs_every_set() -> None:
    """A mean over the sets that a paper happens to have beside a mean over all is the usual unfair comparison."""
    reports = [
        {"collection": name, "reference": reference_rows(name, "test", ("nDCG@10", "R@100"))}
        for name in ("scifact", "nfcorpus", "quora")
    ]
    rows = {row["system"]: row for row in reference_means(reports)}
    mean = rows["all-MiniLM-L6-v2"]["mean"]
    assert mean["nDCG@10"] == pytest.approx((0.6451 + 0.3159 + 0.8755) / 3)
    assert mean["R@100"] is None
    assert rows["bge-reranker-v2-m3 over BM25 multifield top-100"]["mean"]["nDCG@10"] is None


@pytest.mark.parametrize("prefix", ["", "irds:beir/cqadupstack/"])
def test_a_group_has_its_published_figure_when_it_is_whole(prefix: str) -> None:
    """Asked for by its forums' names, CQADupStack had no figure, and so no published mean over sets had it."""
    common = {"split": "test", "measures": ["nDCG@10"], "group": prefix.rstrip("/") or "cqadupstack", "reference": []}
    forums = [{**common, "collection": f"{prefix}{forum}"} for forum in sorted(_GROUPS["cqadupstack"])]
    scifact = {
        **common,
        "collection": "scifact",
        "group": "",
        "reference": reference_rows("scifact", "test", ["nDCG@10"]),
    }
    rows = {row["system"]: row for row in reference_means([scifact, *forums])}
    assert rows["BM25 (Anserini, flat)"]["mean"]["nDCG@10"] == pytest.approx((0.6789 + 0.3021) / 2)
    part = reference_means([scifact, *forums[1:]])
    assert part
    assert all(row["mean"]["nDCG@10"] is None for row in part)
    assert reference_means([{**forums[0], "collection": "android+scifact"}, *forums[1:]]) == []
