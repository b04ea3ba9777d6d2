"""Vocabulary pruning: fewer rows, and not one other bit for texts of kept tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_encoder
from tiny_bodies import FAMILIES, tiny_family
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.schema import StudentSpec, VocabularySpec
from retrieval_kd.students.build import build_student
from retrieval_kd.students.vocabulary import kept_tokens, prune, token_counts

CORPUS = VocabularySpec("corpus")
LETTERS = "abcd"
PIECES = ["ab", "abc", "cd", "bcd", "dad", "abcd"]
SPECIAL = ["[unused]", "[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def wordpiece() -> Tokenizer:
    tokens = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *PIECES, *(f"##{piece}" for piece in PIECES)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    tokenizer.add_special_tokens([AddedToken(token) for token in SPECIAL[1:]])
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("[UNK]", 0.0), ("▁", -2.0), *((c, -6.0) for c in LETTERS), *((p, -len(p) - 1.5) for p in PIECES)]
    pieces += [(f"▁{piece}", -len(piece) - 1.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def pruned(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tokenizer, list[int]]:
    """Prune on a table of bare vectors, which knows its tokenizer alone."""
    content = tokenizer.to_str().encode()
    kept = kept_tokens(content, token_counts(content, texts), CORPUS)
    encoder = tiny_encoder()
    bare = TorchEncoder(encoder.body, None, {"tokenizer.json": content}, encoder.card)
    bare.body.set_input_embeddings(torch.nn.Embedding(tokenizer.get_vocab_size(), 16))
    files = prune(bare, kept).tokenizer_files
    return Tokenizer.from_buffer(files["tokenizer.json"]), kept.tolist()


words = st.text(alphabet=LETTERS, min_size=1, max_size=8)


@pytest.mark.parametrize("make", [wordpiece, unigram])
@settings(max_examples=60, deadline=None)
@given(seen=st.lists(words, min_size=1, max_size=4), text=st.lists(words, max_size=4))
def test_kept_tokens_are_found_again_and_every_text_has_tokens(make: object, seen: list[str], text: list[str]) -> None:
    """Without it a cut vocabulary could split a known text another way, or answer a new one with unknowns."""
    tokenizer = make()
    small, kept = pruned(tokenizer, [" ".join(seen)])
    sentence = " ".join(text)
    before, after = tokenizer.encode(sentence).ids, small.encode(sentence).ids
    if set(before) <= set(kept):
        assert [kept[token] for token in after] == before
    unknown = tokenizer.token_to_id("[UNK]")
    assert unknown not in [kept[token] for token in after]
    seen_text = " ".join(seen)
    assert [kept[token] for token in small.encode(seen_text).ids] == tokenizer.encode(seen_text).ids


def test_kept_tokens_by_hand() -> None:
    """Without it special tokens or letters could be cut, which only an unlucky text would show."""
    content = wordpiece().to_str().encode()
    counts = token_counts(content, ["abc dad", "dad dadcd"])
    ids: dict[str, int] = wordpiece().get_vocab()
    assert {token: int(counts[i]) for token, i in ids.items() if counts[i]} == {"abc": 1, "dad": 3, "##cd": 1}
    letters = [ids[token] for token in ids if len(token.removeprefix("##")) == 1]
    # "[unused]" stays because padding keeps its place.
    always = {*range(5), *letters}
    assert kept_tokens(content, counts, CORPUS).tolist() == sorted({*always, ids["abc"], ids["dad"], ids["##cd"]})
    assert kept_tokens(content, counts, replace(CORPUS, limit=1)).tolist() == sorted({*always, ids["dad"]})


@pytest.mark.parametrize("kind", ["transformer", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_keep_every_bit(family: str, kind: str, tmp_path: Path) -> None:
    """Without it a row out of place, or positions that shift with the padding's id, would cost quality in silence."""
    start = tiny_family(family)
    whole = StudentSpec(kind=kind, layers=(0, 1, 2))
    texts = [" ".join(WORDS[i : i + 5]) for i in range(0, 40, 3)]
    seen = build_student(start, replace(whole, vocabulary=CORPUS), start.card, texts).eval()
    unpruned = build_student(start, whole, start.card, texts).eval()
    if kind == "static":
        # The mean of its vectors is summed over fewer rows, in another order.
        np.testing.assert_allclose(seen.encode(texts, "query"), unpruned.encode(texts, "query"), atol=1e-6)
        tokenizer = unpruned.tokenizer_files["tokenizer.json"]
        seen = prune(unpruned, kept_tokens(tokenizer, token_counts(tokenizer, texts), CORPUS)).eval()
    expected = unpruned.encode(texts, "query")
    assert np.array_equal(seen.encode(texts, "query"), expected)
    assert seen.card.parameters < unpruned.card.parameters
    assert seen.tokenizer(["w59"], "query") == seen.tokenizer(["nobody"], "query")
    seen.save(tmp_path)
    assert np.array_equal(TorchEncoder.open(tmp_path).encode(texts, "query"), expected)
    # The start keeps its own vocabulary.
    assert start.body.get_input_embeddings().num_embeddings == len(WORDS) + 4


def test_prefix_belongs_to_the_vocabulary() -> None:
    """Without it every query would begin with unknown tokens that the corpus never held."""
    base = tiny_encoder()
    card = replace(base.card, query_prefix="w58 w59 ")
    start = TorchEncoder(base.body, None, base.tokenizer_files, card).eval()
    student = build_student(start, StudentSpec(layers=(0, 1), vocabulary=CORPUS), card, ["w1 w2"]).eval()
    assert np.array_equal(student.encode(["w1"], "query"), start.encode(["w1"], "query"))


def test_settings_of_the_tokenizer_follow() -> None:
    """Without it transformers would read special tokens at their old ids."""
    base = tiny_encoder()
    decoder = {"0": {"content": "[PAD]"}, "3": {"content": "[SEP]"}}
    settings_json = json.dumps({"added_tokens_decoder": decoder}).encode()
    start = TorchEncoder(base.body, None, {**base.tokenizer_files, "tokenizer_config.json": settings_json}, base.card)
    small = prune(start, np.array([0, 2, 3, 20]))
    held = json.loads(small.tokenizer_files["tokenizer_config.json"])["added_tokens_decoder"]
    assert held == {"0": decoder["0"], "2": decoder["3"]}


def test_no_text_and_no_such_tokenizer_are_refused() -> None:
    """Without it a recipe would train on letters alone, or on merges that lead nowhere."""
    start = tiny_encoder()
    with pytest.raises(RecipeError, match=r"student.vocabulary: no text to choose tokens by"):
        build_student(start, StudentSpec(layers=(0,), vocabulary=CORPUS), start.card)
    pairs = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    content = pairs.to_str().encode()
    with pytest.raises(RecipeError, match=r"student.vocabulary: a BPE tokenizer makes its tokens out of each other"):
        kept_tokens(content, np.ones(3, dtype=np.int64), CORPUS)
    with pytest.raises(RecipeError, match=r"student.vocabulary.limit: only a collection"):
        VocabularySpec(limit=5)


def test_real_vocabulary_keeps_every_bit(tmp_path: Path) -> None:
    """Without it the claim would hold for toys; sentence-transformers must read the smaller tokenizer the same."""
    from sentence_transformers import SentenceTransformer

    from retrieval_kd.recipes.schema import EncoderSpec

    start = TorchEncoder.load(EncoderSpec())
    texts = ["What is dense retrieval?", "Naïve Bayes, 中文 and \u0394x", "an unaffable quokka"]
    spec = StudentSpec(layers=(0, 3), vocabulary=CORPUS)
    small = build_student(start, spec, start.card, texts).eval()
    expected = build_student(start, replace(spec, vocabulary=VocabularySpec()), start.card).eval()
    assert np.array_equal(small.encode(texts, "query"), expected.encode(texts, "query"))
    assert small.card.parameters < expected.card.parameters - 10_000_000
    small.save(tmp_path)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    others = [*texts, "zyzzyva snorkelwacker 😀"]
    vectors = model.encode_query(others, show_progress_bar=False)
    np.testing.assert_allclose(vectors, small.encode(others, "query"), atol=1e-6)
