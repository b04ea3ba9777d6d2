"""Triples of texts as tokens: what stands where, and what is left when they are too long."""

import pytest
from tokenizers import processors

from retrieval_kd.errors import RecipeError
from retrieval_kd.teachers.rows import PairRows, TripleRows

from .conftest import WORDS, tiny_tokenizer


def words(ids: list[int]) -> list[str]:
    """Return the words of token numbers."""
    return [tiny_tokenizer().id_to_token(number) for number in ids]


def text(count: int, start: int = 0) -> str:
    """Return a text of so many words."""
    return " ".join(WORDS[start : start + count])


def test_a_triple_is_a_pair_and_one_more() -> None:
    """Without it two documents could run into each other, and the model not know where one ends."""
    (row,) = TripleRows(tiny_tokenizer(), 20)([("w1 w2", "w3", "w4 w5")])
    assert words(row.ids) == ["[CLS]", "w1", "w2", "[SEP]", "w3", "[SEP]", "w4", "w5", "[SEP]"]
    assert row.type_ids == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_separators_are_the_tokenizers_own() -> None:
    """Without it RoBERTa's doubled separator would be BERT's single one, which it has never seen."""
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    (row,) = TripleRows(tokenizer, 20)([("w1", "w3", "w4")])
    assert words(row.ids) == ["[CLS]", "w1", "[SEP]", "[SEP]", "w3", "[SEP]", "w4", "[SEP]"]


def test_both_documents_are_cut_alike() -> None:
    """Without it the document that is read second would lose its end, and its place decide the preference."""
    rows = TripleRows(tiny_tokenizer(), 16)
    one, other = rows([("w1 w2", text(30, 10), text(20, 40)), ("w1 w2", text(20, 40), text(30, 10))])
    first = words(one.ids)
    assert first == ["[CLS]", "w1", "w2", "[SEP]", *WORDS[10:15], "[SEP]", *WORDS[40:45], "[SEP]"]
    assert words(other.ids) == ["[CLS]", "w1", "w2", "[SEP]", *WORDS[40:45], "[SEP]", *WORDS[10:15], "[SEP]"]
    (short,) = rows([("w1", "w2", text(30))])
    assert words(short.ids) == ["[CLS]", "w1", "[SEP]", "w2", "[SEP]", *WORDS[:10], "[SEP]"]
    assert len(short.ids) == 16


def test_a_prompt_with_two_documents() -> None:
    """Without it duoT5's words would be laid out as BERT's triple."""
    rows = TripleRows(tiny_tokenizer(), 9, "w50 {query} w51 {first} w52 {second}")
    (row,) = rows([("w1", "w2", text(20))])
    assert words(row.ids) == ["[CLS]", "w50", "w1", "w51", "w2", "w52", "w0", "w1", "[SEP]"]


def test_layouts_that_cannot_be_told_apart_are_refused() -> None:
    """Without it a decoder would read two documents as one."""
    bare = tiny_tokenizer()
    bare.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with pytest.raises(RecipeError, match="puts nothing between two texts; give the model's template"):
        TripleRows(bare, 20)
    with pytest.raises(RecipeError, match="leaves no room beside 4 special tokens"):
        TripleRows(tiny_tokenizer(), 6)


def test_pairs_are_those_of_the_tokenizer() -> None:
    """Without it the cut would be another than the one a published model is used with."""
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(12, strategy="longest_first")
    expected = tokenizer.encode("w1 w2 w3", text(30))
    (row,) = PairRows(tiny_tokenizer(), 12)([("w1 w2 w3", text(30))])
    assert row.ids == expected.ids
    assert row.type_ids == expected.type_ids
