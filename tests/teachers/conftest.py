"""A collection and models small enough to train in a test."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from retrieval_kd.collections.base import Document, Qrels
from retrieval_kd.errors import DataError

WORDS = [f"w{i}" for i in range(60)]
ModelMaker = Callable[..., Path]


class TinyCollection:
    """Forty documents and ten queries of made-up words; query i is about document i."""

    name = "tiny"
    fingerprint = "f" * 64
    corpus_fingerprint = "c" * 64

    def __init__(self) -> None:
        """Documents of one to fifty words, so that batches mix lengths."""
        self._texts = {f"d{i}": " ".join(WORDS[(i * 7 + j * j) % 60] for j in range(1 + i * 5 % 50)) for i in range(40)}

    def documents(self) -> Iterator[Document]:
        """Stream the documents."""
        return (Document(doc_id, "", text) for doc_id, text in self._texts.items())

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return texts by id."""
        wanted = list(doc_ids)
        for doc_id in wanted:
            if doc_id not in self._texts:
                raise DataError(f"tiny: no document {doc_id!r}")
        return {doc_id: self._texts[doc_id] for doc_id in wanted}

    def queries(self) -> Mapping[str, str]:
        """Return the queries."""
        return {f"q{i}": f"{WORDS[i * 7 % 60]} {WORDS[(i * 7 + 1) % 60]}" for i in range(10)}

    def splits(self) -> tuple[str, ...]:
        """Return the one split."""
        return ("train",)

    def qrels(self, split: str) -> Qrels:
        """Return the judgements."""
        return {f"q{i}": {f"d{i}": 1} for i in range(10)}


def tiny_tokenizer() -> Tokenizer:
    """Return a word tokenizer with BERT's special tokens and pair template."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads and lose much where other work holds the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> TinyCollection:
    """Return the collection."""
    return TinyCollection()


@pytest.fixture
def make_model(tmp_path: Path) -> ModelMaker:
    """Return a function that writes a two-layer model: a classifier of ``labels`` labels, or a bare body for 0."""

    def make(name: str = "tiny-ce", labels: int = 1, family: str = "bert", **options: object) -> Path:
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

        config = AutoConfig.for_model(
            family,
            vocab_size=64,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dim=32,
            max_position_embeddings=64,
            num_labels=max(1, labels),
            **{"num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.5, **options},
        )
        folder = tmp_path / name
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = (AutoModelForSequenceClassification if labels else AutoModel).from_config(config)
        model.save_pretrained(folder)
        tiny_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    return make
