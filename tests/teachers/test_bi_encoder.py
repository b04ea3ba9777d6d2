"""The document encoder as its own teacher."""

import numpy as np
import pytest

from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.errors import DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.teachers.bi_encoder import score_with_vectors

CARD = EncoderCard("e", "bert", 1, 1, "mean", True, (2,), 16, "", "", "cosine", "t", "w")
CORPUS = EncodedCorpus(["a", "b", "c"], np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32), CARD, "f", "t")


def test_each_list_meets_its_own_query() -> None:
    """Rows taken in corpus order instead of list order would shuffle the teacher's opinion."""
    lists = [CandidateList("q1", ("c", "a"), (1, 0)), CandidateList("q2", ("b", "c", "a"), (1, 0, 0))]
    one, two = score_with_vectors(np.array([[1, 0], [0.8, 0.6]], np.float32), CORPUS, lists)
    assert one == pytest.approx([0.6, 1.0])
    assert two == pytest.approx([0.6, 0.96, 0.8])
    assert one.dtype == np.float32


def test_unknown_documents_and_wrong_shapes_are_refused() -> None:
    """A missing document read as row 0 would get another document's score."""
    lists = [CandidateList("q1", ("a", "x"), (1, 0))]
    with pytest.raises(DataError, match="document 'x' has no vector"):
        score_with_vectors(np.zeros((1, 2), np.float32), CORPUS, lists)
    with pytest.raises(DataError, match=r"\(2, 2\) for 1 lists"):
        score_with_vectors(np.zeros((2, 2), np.float32), CORPUS, lists)
