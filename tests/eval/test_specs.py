"""``--system`` is read strictly and put into an order in which everything needed comes first."""

from __future__ import annotations

import pytest

from eval.specs import SystemSpec, in_order, needed
from retrieval_kd.errors import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bm25", SystemSpec("bm25")),
        ("first=bm25", SystemSpec("bm25", name="first")),
        ("model:a,b/c,dim=64", SystemSpec("model", "a,b/c", options={"dim": "64"})),
        ("server:localhost:50051", SystemSpec("server", "localhost:50051")),
        ("s=pair:q=x,documents=d", SystemSpec("pair", "q=x", "s", {"documents": "d"})),
        ("model:m,query_prefix=query, or: ", SystemSpec("model", "m", options={"query_prefix": "query, or: "})),
        ("my run=run:a b.trec", SystemSpec("run", "a b.trec", "my run")),
    ],
)
def test_a_specification_is_read_and_written_back(text: str, expected: SystemSpec) -> None:
    """A path with a comma, an address with a colon or a prefix with both would be cut into another system."""
    assert SystemSpec.parse(text) == expected
    assert SystemSpec.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle:x", "no kind 'modle', did you mean 'model'"),
        ("model", "model needs a target"),
        ("bm25:x", "bm25 takes no target"),
        ("model:x,dims=3", "no option 'dims', did you mean 'dim'"),
        ("run:x,depth=3", "run has no option 'depth'; it has none"),
        ("model:x,dim=3,dim=4", "dim is given twice"),
        ("", "write"),
    ],
)
def test_a_wrong_specification_says_what_to_write(text: str, message: str) -> None:
    """A misspelt option that is ignored measures another system than the one asked for."""
    with pytest.raises(DataError, match=message):
        SystemSpec.parse(text)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_a_number_must_be_one(value: str) -> None:
    """``dim=0`` would cut every vector to nothing."""
    with pytest.raises(DataError, match="not a whole number of at least 1"):
        SystemSpec("model", "m", options={"dim": value}).integer("dim", 1)
    with pytest.raises(DataError, match="not a list of numbers"):
        SystemSpec("weighted", "a+b", options={"weights": "0.3;0.7"}).numbers("weights")


def _order(*texts: str) -> list[str]:
    return [str(spec) for spec in in_order([SystemSpec.parse(text) for text in texts])]


def test_only_what_a_system_needs_is_opened_for_its_bench() -> None:
    """Opening every system in a bench's process would count their memory as one system's."""
    ordered = in_order([SystemSpec.parse(text) for text in ("d=model:M", "ce=rerank:M,over=bm25", "x=rrf:ce+d")])
    assert [spec.reference for spec in needed(ordered, "ce")] == ["bm25", "ce"]
    assert [spec.reference for spec in needed(ordered, "d")] == ["d"]
    assert {spec.reference for spec in needed(ordered, "x")} == {"bm25", "ce", "d", "x"}


def test_what_is_needed_comes_first() -> None:
    """A reranker before its first stage would have nothing to rerank."""
    both, ce, first, dense = "both=rrf:ce+dense", "ce=rerank:M,over=first", "first=bm25", "dense=model:M"
    assert _order(both, ce, first, dense) == [first, ce, dense, both]
    assert _order("rerank:M") == ["bm25", "rerank:M"]
    assert _order("bm25", "rerank:M") == ["bm25", "rerank:M"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("model:a", "model:b"), "another one is called 'model' too; give it a name"),
        (("rrf:bm25+dence", "dense=model:a"), "no system 'dence', did you mean 'dense'"),
        (("a=rrf:b+bm25", "b=rrf:a+bm25"), "needs its own result"),
        (("a=rrf:a+bm25",), "needs its own result"),
    ],
)
def test_an_impossible_order_is_refused(texts: tuple[str, ...], message: str) -> None:
    """Two systems under one name, or a circle, would be measured wrongly or for ever."""
    with pytest.raises(DataError, match=message):
        _order(*texts)
