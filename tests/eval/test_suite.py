"""Several systems on several collections in one call: each text encoded once, each set weighed the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from tiny import WORDS, tiny_collection_folder, tiny_cross_encoder_folder

from eval.dense import encoded, truncated_corpus
from eval.specs import SystemSpec
from eval.suite import Set, Setup, expand, run_suite, summarise
from retrieval_kd.collections.open import open_collection
from retrieval_kd.encoders.matryoshka import TruncatedEncoder
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import ArtifactError, DataError, EncoderMismatch, QualityError
from retrieval_kd.recipes.schema import CollectionSpec
from retrieval_kd.runs import read_trec

QUICK = Setup(timed=0)


def _run(tiny: Path, out: Path, collections: list[Path], *systems: str, setup: Setup = QUICK) -> list[dict[str, Any]]:
    specs = [SystemSpec.parse(text) for text in systems]
    return run_suite([str(path) for path in collections], specs, setup, tiny / "eval-cache", out, "rkd eval beir")


def _means(report: dict[str, Any]) -> dict[str, float]:
    return {system["name"]: system["nDCG@10"] for system in report["systems"]}


@pytest.fixture(scope="module")
def second(tiny: Path) -> Path:
    """Return another collection of the same words."""
    return tiny_collection_folder(tiny / "second-collection", per_topic=3, seed=5)


def test_every_kind_of_system_in_one_call(tiny: Path, tmp_path: Path) -> None:
    """Each kind must reach the table by one path, over the same queries, and be found in the provenance."""
    model = tiny / "tiny-encoder"
    reports = _run(
        tiny, tmp_path / "out", [tiny / "tiny-collection"],
        "bm25", f"dense=model:{model}", f"small=model:{model},dim=8", f"pair:{model},documents={model}",
        "rrf:bm25+dense", "w=weighted:bm25+dense,weights=1+0,normalise=minmax",
    )  # fmt: skip
    (report,) = reports
    means = _means(report)
    assert list(means) == [
        "BM25 (lucene, k1 0.9, b 0.4)", "dense", "small", "tiny",
        "RRF of BM25 (lucene, k1 0.9, b 0.4) + dense, k 60", "w",
    ]  # fmt: skip
    assert means["tiny"] == means["dense"]
    assert means["w"] == pytest.approx(means["BM25 (lucene, k1 0.9, b 0.4)"], abs=0.02)
    assert means["small"] != means["dense"]
    assert report["baseline"] == "BM25 (lucene, k1 0.9, b 0.4)"
    assert set(report["provenance"]["systems"]) == set(means)
    with (tmp_path / "out/qrels.txt").open() as file:
        assert len(pytrec_eval.parse_qrel(file)) == report["systems"][0]["queries"]
    again = _run(tiny, tmp_path / "again", [tiny / "tiny-collection"], f"f=run:{tmp_path / 'out/runs/dense.trec'}")
    assert _means(again[0])["f"] == means["dense"]


def test_a_corpus_is_encoded_once_whatever_it_is_part_of(
    tiny: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding is hours on a real corpus: as a base, as a distractor and in a second call it is the same vectors."""
    texts: list[str] = []
    encode = TorchEncoder.encode

    def counted(self: TorchEncoder, batch: list[str], side: str) -> Any:
        texts.extend(batch if side == "document" else [])
        return encode(self, batch, side)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchEncoder, "encode", counted)
    collections, system = [tiny / "tiny-collection", second], f"dense=model:{tiny / 'tiny-encoder'}"
    cache = tmp_path / "cache"
    specs = [SystemSpec.parse(system)]
    setup = Setup(timed=0, distractors=(str(second), str(tiny / "tiny-collection")))
    for name in ("one", "two"):
        reports = run_suite([str(c) for c in collections], specs, setup, cache, tmp_path / name, "rkd")
        assert [report["documents"] for report in reports] == [72 + 36, 36 + 72]
    assert len(texts) == 72 + 36


def test_joined_vectors_are_those_of_the_whole(tiny: Path, second: Path, tmp_path: Path) -> None:
    """A row under another document's id would still look like a plausible ranking."""
    encoder = TorchEncoder.open(tiny / "tiny-encoder")
    joined = open_collection(CollectionSpec(str(tiny / "tiny-collection"), (str(second),)))
    corpus = encoded(encoder, joined, tmp_path)
    assert corpus.ids == sorted(document.doc_id for document in joined.documents())
    assert corpus.texts_fingerprint == joined.corpus_fingerprint
    contents = joined.contents(corpus.ids)
    for doc_id in corpus.ids[::9]:
        alone = encoder.encode([contents[doc_id]], "document")[0]
        np.testing.assert_allclose(corpus.vectors[corpus.row_of[doc_id]], alone, atol=1e-5)


def test_a_cut_vector_is_the_first_numbers_at_unit_length(tiny: Path, tmp_path: Path) -> None:
    """Without unit length again, long documents' cut vectors win by length alone."""
    encoder = TorchEncoder.open(tiny / "tiny-encoder")
    corpus = encoded(encoder, open_collection(CollectionSpec(str(tiny / "tiny-collection"))), tmp_path)
    cut = truncated_corpus(corpus, 8, tmp_path)
    expected = corpus.vectors[:, :8] / np.linalg.norm(corpus.vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut.vectors, expected, rtol=1e-6)
    small = TruncatedEncoder(encoder, 8)
    assert small.card.space_fingerprint == cut.card.space_fingerprint != corpus.card.space_fingerprint
    np.testing.assert_allclose(np.linalg.norm(small.encode(WORDS[:3], "query"), axis=1), 1, rtol=1e-6)
    with pytest.raises(EncoderMismatch, match="encoder 'tiny' gives 16 numbers, which cannot be cut to 17"):
        TruncatedEncoder(encoder, 17)


@pytest.mark.parametrize("stage", ["encode", "join-vectors", "truncate"])
def test_kept_vectors_that_changed_are_named(tiny: Path, second: Path, tmp_path: Path, stage: str) -> None:
    """Without it a disk's flipped bit in the cache would be a system's measured quality."""
    encoder = TorchEncoder.open(tiny / "tiny-encoder")
    joined = open_collection(CollectionSpec(str(tiny / "tiny-collection"), (str(second),)))

    def made() -> None:
        truncated_corpus(encoded(encoder, joined, tmp_path), 8, tmp_path)

    made()
    vectors = next(tmp_path.glob(f"{stage}-*")) / "vectors.npy"
    content = bytearray(vectors.read_bytes())
    content[-1] ^= 1
    vectors.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{stage}-.*vectors.npy: bytes differ"):
        made()


def test_spaces_are_not_mixed_unless_declared(tiny: Path, tmp_path: Path) -> None:
    """A query encoder of another space ranks at random, and the table would say it was bad."""
    from tiny import tiny_encoder_folder

    other = tiny_encoder_folder(tmp_path / "other", seed=3)
    pair = f"p=pair:{other},documents={tiny / 'tiny-encoder'}"
    with pytest.raises(EncoderMismatch, match="cannot search documents encoded by"):
        _run(tiny, tmp_path / "out", [tiny / "tiny-collection"], pair)
    (report,) = _run(tiny, tmp_path / "out", [tiny / "tiny-collection"], f"{pair},same_space=yes")
    assert report["systems"][0]["role"] == "student"


def test_an_empty_path_is_refused_and_not_the_current_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it an unset variable of a shell measures whatever collections lie below."""
    shutil.copytree(tiny / "tiny-collection", tmp_path / "below" / "one")
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(DataError, match="collection: the path '' is empty; name a folder"):
        run_suite([""], [SystemSpec.parse("bm25")], QUICK, tmp_path / "cache", tmp_path / "out", "rkd eval beir")


def test_the_mean_over_sets_weighs_sets_and_groups_alike(tiny: Path, second: Path, tmp_path: Path) -> None:
    """CQADupStack's twelve forums as twelve sets would drown the other sets; the list must be named."""
    forums = tmp_path / "forums"
    for name, source in (("one", tiny / "tiny-collection"), ("two", second)):
        shutil.copytree(source, forums / name)
    assert expand(str(forums)) == [Set(str(forums / "one"), "forums"), Set(str(forums / "two"), "forums")]
    out = tmp_path / "out"
    reports = _run(tiny, out, [tiny / "tiny-collection", forums], "bm25")
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(summarise(reports)))
    assert [entry["name"] for entry in summary["sets"]] == ["tiny-collection", "forums"]
    html = (out / "summary.html").read_text()
    assert [part for part in ("tiny-collection", "one", "two") if f'href="{part}/report.html"' in html] == [
        "tiny-collection", "one", "two",
    ]  # fmt: skip
    assert "mean of 2" in html
    assert summary["sets"][1]["collections"] == ["one", "two"]
    values = [next(iter(_means(report).values())) for report in reports]
    (row,) = summary["systems"]
    assert row["sets"]["forums"]["nDCG@10"] == pytest.approx((values[1] + values[2]) / 2)
    assert row["mean"]["nDCG@10"] == pytest.approx((values[0] + (values[1] + values[2]) / 2) / 2)
    assert read_trec(out / "one" / "runs" / "bm25-lucene-k1-0.9-b-0.4.trec")
    with pytest.raises(DataError, match="other systems or measures"):
        summarise([reports[0], {**reports[1], "measures": ["AP"]}])


def test_students_are_compared_with_their_teacher(tiny: Path, tmp_path: Path) -> None:
    """Agreement must be of the teacher named, cosines only where vectors share a space, and the gate must stop."""
    model = tiny / "tiny-encoder"
    systems = ("bm25", f"t=model:{model}", f"copy=pair:{model},documents={model}", f"small=model:{model},dim=4")
    setup = Setup(timed=0, teacher="t")
    (report,) = _run(tiny, tmp_path / "out", [tiny / "tiny-collection"], *systems, setup=setup)
    entries = {entry["student"]: entry for entry in report["agreements"]}
    assert set(entries) == {"BM25 (lucene, k1 0.9, b 0.4)", "copy", "small"}
    assert report["baseline"] == "t"
    assert entries["copy"]["cosines"]["p1"] == pytest.approx(1)
    assert (entries["copy"]["top1"], entries["copy"]["overlap"]) == (1.0, 1.0)
    assert entries["small"]["cosines"] is None
    assert entries["small"]["overlap"] < 1
    strict = Setup(timed=0, teacher="t", max_loss=0.001)
    _run(tiny, tmp_path / "same", [tiny / "tiny-collection"], *systems[1:3], setup=strict)
    with pytest.raises(QualityError, match=r"'small' may lose more than 0\.001"):
        _run(tiny, tmp_path / "gate", [tiny / "tiny-collection"], systems[1], systems[3], setup=strict)
    assert (tmp_path / "gate" / "report.json").exists()


def test_self_matches_and_passages_reach_the_notes(tiny: Path, tmp_path: Path) -> None:
    """Numbers after such a step are not comparable with numbers before it, so the report says it."""
    setup = Setup(timed=0, remove_self=True, maxp=True)
    (report,) = _run(tiny, tmp_path / "out", [tiny / "tiny-collection"], "bm25", setup=setup)
    assert len(report["notes"]) == 2
    run = read_trec(next((tmp_path / "out/runs").iterdir()))
    assert not any("#" in doc_id for ranking in run.values() for doc_id in ranking.doc_ids)


def test_passages_and_documents_are_fused_by_document(tiny: Path, tmp_path: Path) -> None:
    """Fused by their ids, a passage and its document would not meet, and each would count as found by one system."""
    collection, setup = tiny / "tiny-collection", Setup(timed=0, maxp=True)
    _run(tiny, tmp_path / "first", [collection], "one=bm25", setup=setup)
    model = tiny_cross_encoder_folder(tmp_path / "cross-encoder")
    systems = (
        "one=bm25", f"file=run:{tmp_path / 'first/runs/one.trec'}", "both=rrf:one+file", "same=rrf:both+one",
        f"passages=rerank:{model},over=one,depth=5", f"documents=rerank:{model},over=both,depth=5",
    )  # fmt: skip
    (report,) = _run(tiny, tmp_path / "out", [collection], *systems, setup=setup)
    one, both = (read_trec(tmp_path / f"out/runs/{name}.trec") for name in ("one", "both"))
    assert {query: ranking.doc_ids for query, ranking in both.items()} == {
        query: ranking.doc_ids for query, ranking in one.items()
    }
    means = _means(report)
    assert means["one"] == means["both"] == means["same"]
    assert set(means) > {"passages", "documents"}


@pytest.mark.parametrize(
    ("systems", "setup", "message"),
    [
        ((), QUICK, "no system to measure"),
        (("bm25",), Setup(measures=("nDGC@10",)), "did you mean 'nDCG@10'"),
        (("bm25",), Setup(split="tset"), "no split 'tset'"),
        (
            ("bm25",),
            Setup(measures=("R@200",)),
            "'R@200' needs 200 documents a query, 100 are retrieved; raise the depth",
        ),
        (("rerank:x,depth=200",), QUICK, "depth is more than the 100 documents retrieved; raise --depth"),
        (("bm25", "f=run:nowhere.trec"), QUICK, "nowhere.trec: cannot read the run"),
        (("bm25",), Setup(timed=0, baseline="dense"), "baseline 'dense' is not among"),
        (("pair:x",), QUICK, "documents=MODEL"),
        (("bm25", "b=bm25"), Setup(max_loss=0.01), "--max-loss 0.01: a loss is against a teacher; name it"),
        (("bm25",), Setup(teacher="bm25", max_loss=0.01), "--max-loss 0.01: teacher 'bm25' is the only system"),
        (("bm25", "b=bm25"), Setup(teacher="c", max_loss=0.01), "teacher 'c' is not among the systems"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tiny: Path, tmp_path: Path, systems: tuple[str, ...], setup: Setup, message: str
) -> None:
    """A wrong call must fail with its reason and leave no report."""
    with pytest.raises(DataError, match=message) as error:
        _run(tiny, tmp_path / "out", [tiny / "tiny-collection"], *systems, setup=setup)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "report.json").exists()


def test_collections_that_a_summary_cannot_tell_apart_are_refused(
    tiny: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one name were averaged as one set, and reports of folders alike but for their accents overwritten."""
    monkeypatch.chdir(tmp_path)
    for name in ("aa/c", "bb/c", "é/d", "è/d", "forums/one", "other/forums/two"):
        shutil.copytree(second, name)
    for paths in (
        ("aa/c", "bb/c"), ("aa/c", "aa/c"), ("é/d", "è/d"), ("forums", "other/forums"), ("forums", "forums/one"),
    ):  # fmt: skip
        refused = ("forums/one", "other/forums/two") if "other/forums" in paths else paths
        with pytest.raises(DataError, match=f"^{refused[0]}.* and {refused[1]}: a summary could not tell") as error:
            _run(tiny, tmp_path / "out", [Path(path) for path in paths], "bm25")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    assert len(_run(tiny, tmp_path / "out", [Path("aa/c"), Path("é/d"), Path("forums")], "bm25")) == 3


def test_measures_with_a_dot_reach_the_pages(tiny: Path, second: Path, tmp_path: Path) -> None:
    """A template that splits a measure's name at its dot fails after everything was measured."""
    setup = Setup(timed=0, measures=("IPrec@0.5", "Compat(p=0.5)"))
    _run(tiny, tmp_path, [tiny / "tiny-collection", second], "bm25", "b=bm25", setup=setup)
    for page in ("summary.html", "second-collection/report.html"):
        html = (tmp_path / page).read_text()
        assert "IPrec@0.5" in html
        assert 'class="best"' in html


def test_one_judged_query_is_reported_without_tests(tiny: Path, second: Path, tmp_path: Path) -> None:
    """All systems would be measured and then nothing written, because one query cannot be tested."""
    one = tmp_path / "one"
    shutil.copytree(second, one)
    qrels = one / "qrels/test.tsv"
    header, first, *_ = qrels.read_text().splitlines()
    qrels.write_text(f"{header}\n{first}\n")
    (report,) = _run(tiny, tmp_path / "out", [one], "bm25", "b=bm25")
    assert report["comparisons"] == []
    assert "nothing is tested" in report["notes"][0]
    assert "nothing is tested" in (tmp_path / "out/report.html").read_text()
    gate = Setup(timed=0, teacher="b", max_loss=0.5)
    with pytest.raises(DataError, match="one: split 'test' judges one query, --max-loss needs at least two"):
        _run(tiny, tmp_path / "gate", [one], "bm25", "b=bm25", setup=gate)
    assert not (tmp_path / "gate").exists()
    assert _run(tiny, tmp_path / "more", [second], "bm25", "b=bm25")[0]["notes"] == []
