"""Late interaction: MaxSim by hand, the same alone and in a batch, through sentence-transformers and without."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval_kd.errors import RecipeError
from retrieval_kd.runs import Shortlist
from retrieval_kd.scores.store import ScoreStore
from retrieval_kd.teachers import late_interaction
from retrieval_kd.teachers.late_interaction import LateInteraction, maxsim
from retrieval_kd.teachers.scoring import score_candidates

from .conftest import ModelMaker, TinyCollection


def draw(lengths: list[int], seed: int) -> list[Tensor]:
    """Return texts of random token vectors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in lengths]


def test_maxsim_golden() -> None:
    """Without it a mean for a sum, or the best query token for each document token, would look like a score."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    documents = [torch.tensor([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, -1.0]])]
    assert maxsim([query, query[:1]], documents).tolist() == [[pytest.approx(1.8), -1.0], [1.0, 0.0]]


def test_maxsim_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it tokens of neighbouring documents could count, which no single pair would show."""
    queries, documents = draw([3, 1, 7], 1), draw([5, 1, 9, 2], 2)
    expected = [[float((q @ d.T).max(dim=1).values.sum()) for d in documents] for q in queries]
    np.testing.assert_allclose(maxsim(queries, documents), expected, atol=1e-5)
    monkeypatch.setattr(late_interaction, "_SIMILARITIES", 20)
    np.testing.assert_allclose(maxsim(queries, documents), expected, atol=1e-5)


def test_with_one_token_it_is_the_dot_product() -> None:
    """Without it TCT's student could not reach its teacher even where they are the same model."""
    queries, documents = draw([1] * 4, 3), draw([1] * 5, 4)
    np.testing.assert_allclose(maxsim(queries, documents), torch.cat(queries) @ torch.cat(documents).T, atol=1e-6)


def test_order_and_repetition_of_document_tokens_do_not_matter() -> None:
    """Without it padding that is repeated, or a sum over documents' tokens, would go unseen."""
    (query,), (document,) = draw([4], 5), draw([6], 6)
    twice = torch.cat([document.flip(0), document[:2]])
    np.testing.assert_allclose(maxsim([query], [document]), maxsim([query], [twice]), atol=1e-6)


def test_a_text_without_tokens_has_no_score() -> None:
    """Without it an empty document would get 0, more than a document that is against the query."""
    (query,) = draw([2], 7)
    assert maxsim([query], [torch.empty(0, 8), query]).tolist()[0][0] == -np.inf


def test_any_encoder_is_a_late_interaction_model(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """Without it states of padding, or vectors of another length than one, would enter the sum."""
    from transformers import AutoModel

    folder = make_model("bare", labels=0)
    teacher = LateInteraction.load(str(folder), 40)
    queries, documents = list(tiny.queries().values()), list(tiny.contents([f"d{i}" for i in range(12)]).values())
    matrix = teacher.matrix(queries, documents)
    body = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = []
        for text in (queries[3], documents[5]):
            ids = torch.tensor([teacher._encoder._tokenizer.encode(text).ids])
            tokens.append(torch.nn.functional.normalize(body(input_ids=ids).last_hidden_state[0], dim=-1))
    assert matrix[3, 5].item() == pytest.approx((tokens[0] @ tokens[1].T).max(dim=1).values.sum().item(), abs=1e-4)
    pairs = [(query, document) for query in queries for document in documents]
    scores = teacher.score(pairs)
    np.testing.assert_allclose(scores, matrix.flatten(), atol=1e-4)
    np.testing.assert_allclose([teacher.score([pair])[0] for pair in pairs[::17]], scores[::17], atol=1e-4)
    assert np.ptp(scores) > 0.1


def test_prefixes_and_length_are_used(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """Without it a model that needs its prefix would be scored without, and nobody be told."""
    folder = str(make_model("bare", labels=0))
    query, document = tiny.queries()["q1"], tiny.contents(["d9"])["d9"]
    plain, prefixed = LateInteraction.load(folder, 40), LateInteraction.load(folder, 40, "w5 ", "w6 ")
    expected = plain.score([(f"w5 {query}", f"w6 {document}")])
    np.testing.assert_allclose(prefixed.score([(query, document)]), expected, atol=1e-5)
    short = LateInteraction.load(folder, 8)
    cut = " ".join(document.split()[:6])
    np.testing.assert_allclose(short.score([(query, document)]), plain.score([(query, cut)]), atol=1e-5)
    assert len({plain.fingerprint, prefixed.fingerprint, short.fingerprint}) == 3
    with pytest.raises(RecipeError, match="65 is more than the 64 positions"):
        LateInteraction.load(folder, 65)


def test_scores_become_a_store(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """Without it the store would not say that its scores are sums over tokens and not logits."""
    teacher = LateInteraction.load(str(make_model("bare", labels=0)), 40)
    lists = [Shortlist("q1", ("d3", "d1")), Shortlist("q2", ("d1", "d2"))]
    artifact = score_candidates(teacher, tiny, lists, tmp_path / "s")
    assert artifact.config["reading"] == "maxsim"
    texts = tiny.contents(["d1", "d2", "d3"])
    expected = teacher.score([(tiny.queries()["q1"], texts["d3"]), (tiny.queries()["q1"], texts["d1"])])
    np.testing.assert_allclose(ScoreStore.open(tmp_path / "s").score_lists(lists)[0], expected, atol=1e-4)


def test_a_multi_vector_encoder_scores_as_its_own_library(
    make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path
) -> None:
    """Without it a published ColBERT's projection, masks or markers could be left out, at a third of its quality."""
    import sentence_transformers
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize

    folder = make_model("bare", labels=0)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]", '
        '"cls_token": "[CLS]", "sep_token": "[SEP]"}'
    )
    torch.manual_seed(3)
    model = sentence_transformers.MultiVectorEncoder(
        modules=[
            Transformer(str(folder), document_length=20),
            Dense(16, 6, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"),
            MultiVectorMask(skiplist_words=["w7", "w14"]),
            Normalize(module_input_name="token_embeddings"),
        ],
        prompts={"query": "w5 ", "document": "w6 "},
        device="cpu",
    )
    model.save_pretrained(str(tmp_path / "late"))
    queries, documents = list(tiny.queries().values()), list(tiny.contents([f"d{i}" for i in range(12)]).values())
    expected = model.similarity(
        model.encode_query(queries, show_progress_bar=False), model.encode_document(documents, show_progress_bar=False)
    )
    teacher = LateInteraction.load(str(tmp_path / "late"), 40)
    np.testing.assert_allclose(teacher.matrix(queries, documents), expected, atol=1e-4)
    assert teacher.parameters == sum(weights.numel() for weights in model.parameters())
    shorter = LateInteraction.load(str(tmp_path / "late"), 10)
    assert not np.allclose(shorter.matrix(queries, documents), expected, atol=1e-2)
