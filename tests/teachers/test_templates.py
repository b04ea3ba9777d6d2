"""Prompts: every word of the prompt stays, the texts share what is left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Encoding

from retrieval_kd.errors import RecipeError
from retrieval_kd.teachers.templates import Template, longest_first

from .conftest import WORDS, tiny_tokenizer

PROMPT = "w58 {query} w57 {document} w59"


def words(count: int) -> str:
    """Return a text of so many words."""
    return " ".join(WORDS[i % 50] for i in range(count))


def tokens(row: Encoding) -> list[str]:
    """Return the words of a row; unlike ``row.tokens`` also where the tokenizer kept numbers only."""
    return [tiny_tokenizer().id_to_token(number) for number in row.ids]


def test_longest_first_golden() -> None:
    """Without it two long texts could be cut to a sum that is over the limit, or far below it."""
    assert longest_first([2, 9, 9], 12) == 5
    assert longest_first([2, 9, 9], 13) == 5
    assert longest_first([3, 3], 6) == 3
    assert longest_first([30, 3], 6) == 3
    assert longest_first([1, 30], 6) == 5


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(4, 60))
def test_longest_first_is_the_largest_that_fits(lengths: list[int], budget: int) -> None:
    """Without it text would be thrown away that had room."""

    def total(length: int) -> int:
        return sum(min(row, length) for row in lengths)

    length = longest_first(lengths, budget)
    assert total(length) <= budget
    assert total(length) == sum(lengths) or total(length + 1) > budget


def test_the_prompt_is_filled_as_a_string_would_be() -> None:
    """Without it the model would read other tokens than it was trained on, where words meet the prompt."""
    template = Template(PROMPT, ("query", "document"), tiny_tokenizer(), 40)
    (row,) = template([("w1 w2", "w3")])
    assert tokens(row) == ["[CLS]", "w58", "w1", "w2", "w57", "w3", "w59", "[SEP]"]


def test_a_text_that_names_a_place_is_not_filled() -> None:
    """Without it a document about templates would swallow the query."""
    template = Template("{document} w57 {query}", ("query", "document"), tiny_tokenizer(), 40)
    (row,) = template([("w1", "{query} {document}")])
    assert tokens(row) == ["[CLS]", "[UNK]", "[UNK]", "w57", "w1", "[SEP]"]


@pytest.mark.parametrize(("query", "document"), [(3, 100), (100, 3), (100, 100), (16, 17), (0, 60)])
def test_texts_are_cut_and_the_prompt_is_not(query: int, document: int) -> None:
    """Without it the words after a long document, where a decoder looks for its answer, would be cut off."""
    template = Template(PROMPT, ("query", "document"), tiny_tokenizer(), 20)
    (row,) = template([(words(query), words(document))])
    assert len(row) <= 20
    assert [token for token in tokens(row) if token in ("w58", "w57", "w59")] == ["w58", "w57", "w59"]
    assert tokens(row)[-2:] == ["w59", "[SEP]"]
    assert len(row) >= 19
    assert tokens(row)[2 : 2 + min(query, 3)] == words(min(query, 3)).split()


def test_a_prompt_without_room_is_refused() -> None:
    """Without it every pair would be the prompt alone, and every score the same."""
    with pytest.raises(RecipeError, match="takes 5 of max_length 6"):
        Template(PROMPT, ("query", "document"), tiny_tokenizer(), 6)
