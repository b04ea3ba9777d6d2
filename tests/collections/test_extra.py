"""Extra texts: whose they are, and whose they must not be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from retrieval_kd.collections.base import Collection
from retrieval_kd.collections.extra import extra_texts
from retrieval_kd.collections.open import open_collection
from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.schema import CollectionSpec, ExtraTextsSpec

CORPUS = [
    {"_id": "a", "title": "Numbers", "text": "Too short. One sentence of six words here! Another one with five words?"},
    {"_id": "b", "title": "Nothing", "text": "3.1 A. B."},
]


def collection(root: Path, name: str, queries: dict[str, tuple[str, str]]) -> Collection:
    """Write a BEIR folder whose queries are given as id to (split, text), every one answered by document a."""
    folder = root / name
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CORPUS))
    rows = [{"_id": query_id, "text": text} for query_id, (_, text) in queries.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("train", "dev", "test"):
        lines = [f"{query_id}\ta\t1\n" for query_id, (of, _) in queries.items() if of == split]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *lines]))
    return open_collection(CollectionSpec(str(folder)))


OWN = {"q1": ("train", "own train"), "q2": ("dev", "own dev"), "q3": ("test", "own test")}


def test_other_collections_give_their_train_queries_alone(tmp_path: Path) -> None:
    """Without it a student could be moved to the vectors of the very queries it is measured on."""
    own = collection(tmp_path, "own", OWN)
    other = collection(
        tmp_path,
        "other",
        {
            "q1": ("train", "other train"),
            "q2": ("train", "Own test?"),
            "q3": ("test", "other test"),
            "q4": ("dev", "other dev"),
        },
    )
    assert extra_texts(own, [other], phrases=False, most=9) == {"other/query/q1": "other train"}


def test_phrases_are_cut_by_the_document_alone(tmp_path: Path) -> None:
    """Without it a run resumed in another process could regress other phrases than the ones it began with."""
    own = collection(tmp_path, "own", OWN)
    texts = extra_texts(own, [], phrases=True, most=9)
    assert extra_texts(own, [], phrases=True, most=9) == texts
    assert len(texts) >= 2
    for text_id, text in texts.items():
        document, number, start = text_id.removeprefix("own/document/").split("/")
        sentence = ("Too short.", "One sentence of six words here!", "Another one with five words?")[
            int(number)
        ].split()
        words = text.split()
        assert document == "a"
        assert 3 <= len(words) <= 14
        assert sentence[int(start) : int(start) + len(words)] == words


def test_phrases_cover_a_sentence_and_vary_in_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it long sentences would teach by their beginnings alone, or all phrases be of one length."""
    sentence = " ".join(f"w{i}" for i in range(1000))
    monkeypatch.setitem(CORPUS[0], "text", sentence)
    phrases = list(extra_texts(collection(tmp_path, "long", OWN), [], phrases=True, most=999).values())
    assert sentence.startswith(" ".join(phrases))
    assert sum(len(phrase.split()) for phrase in phrases) > 997
    lengths = {len(phrase.split()) for phrase in phrases}
    assert (min(lengths), max(lengths)) == (3, 14)
    assert len(lengths) > 8


def test_a_text_comes_once(tmp_path: Path) -> None:
    """Without it a document that two collections share would weigh twice."""
    own = collection(tmp_path, "own", OWN)
    other = collection(tmp_path, "other", {**OWN, "q1": ("train", "other train")})
    texts = extra_texts(own, [other], phrases=True, most=9)
    assert list(texts) == ["other/query/q1", "own/document/a/1/0", "own/document/a/2/0"]


def test_no_more_texts_are_taken_than_a_training_reads(tmp_path: Path) -> None:
    """Without it a corpus of millions would be held in memory and encoded for a few thousand steps."""
    own = collection(tmp_path, "own", OWN)
    queries = {**{f"r{i}": ("train", f"text {i % 30}") for i in range(60)}, "q2": OWN["q2"], "q3": OWN["q3"]}
    others = [collection(tmp_path, name, queries) for name in ("one", "two")]
    every = extra_texts(own, others, phrases=True, most=99)
    assert len(every) == 32
    some = extra_texts(own, others, phrases=True, most=10)
    assert list(some.items()) == [item for item in every.items() if item[0] in some]
    smallest = sorted(every, key=lambda text_id: hashlib.sha256(every[text_id].encode()).digest()[:8])[:10]
    assert set(some) == set(smallest)
    # The order in which copies come does not decide which texts are taken.
    assert set(extra_texts(own, others[::-1], phrases=True, most=10).values()) == set(some.values())


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"batch": -1}, "batch"),
        ({"collections": ("somewhere",)}, "collections|collection"),
        ({"batch": 4, "phrases": False}, "neither"),
    ],
)
def test_a_spec_that_would_be_ignored_is_refused(spec: dict[str, object], named: str) -> None:
    """Without it a user who names collections and forgets the batch would train without them and not know."""
    with pytest.raises(RecipeError, match=named):
        ExtraTextsSpec(**spec)  # type: ignore[arg-type]
