"""Tiny models and collections made on the spot, for tests that need the real formats but not real quality."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.torch_encoder import TorchEncoder

WORDS = [f"w{i}" for i in range(60)]
TOPICS = 12


def tiny_encoder(seed: int = 0, layers: int = 2, width: int = 16, max_length: int = 24) -> TorchEncoder:
    """Return a random BERT over :data:`WORDS` that distinguishes texts but understands nothing."""
    from transformers import BertConfig, BertModel

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    body = BertModel(config, add_pooling_layer=False)
    card = EncoderCard(
        name="tiny",
        architecture="bert",
        layers=layers,
        parameters=0,
        pooling="mean",
        normalize=True,
        dimensions=(width,),
        max_length=max_length,
        query_prefix="",
        document_prefix="",
        similarity="cosine",
        tokenizer_hash="0" * 64,
        weights_hash="",
    )
    encoder = TorchEncoder(body, None, {"tokenizer.json": tokenizer.to_str().encode()}, card)
    encoder.refresh_card()
    return encoder.eval()


def tiny_encoder_folder(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Save :func:`tiny_encoder` in sentence-transformers layout."""
    tiny_encoder(seed, layers).save(folder)
    return folder


def tiny_cross_encoder_folder(folder: Path, seed: int = 0, labels: int = 1) -> Path:
    """Save a random sequence classifier over :data:`WORDS` with its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        initializer_range=0.3,
        num_labels=labels,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tiny_encoder().tokenizer_files["tokenizer.json"])
    return folder


def tiny_collection_folder(folder: Path, per_topic: int = 6, seed: int = 0) -> Path:
    """Write a BEIR folder of documents on twelve topics; a query shares words with its document."""
    rng = np.random.default_rng([seed, 1])
    corpus, queries = [], []
    qrels: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for topic in range(TOPICS):
        vocabulary = WORDS[5 * topic : 5 * topic + 5]
        for i in range(per_topic):
            doc_id = f"d{topic}-{i}"
            common = [WORDS[j] for j in rng.integers(0, len(WORDS), size=4)]
            own = [vocabulary[j] for j in rng.integers(0, 5, size=6)]
            corpus.append({"_id": doc_id, "title": "", "text": " ".join([*own, *common])})
            split = "dev" if i == 0 else "test" if i == 1 else "train"
            query_id = f"q{topic}-{i}"
            queries.append({"_id": query_id, "text": " ".join([*own[:3], common[0]])})
            qrels[split].append((query_id, doc_id))
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, pairs in qrels.items():
        lines = [f"{query_id}\t{doc_id}\t1\n" for query_id, doc_id in pairs]
        (folder / "qrels" / f"{split}.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *lines]))
    return folder


def tiny_overrides(root: Path, mode: str) -> list[str]:
    """Return the overrides that shrink a recipe to the tiny collection and encoder under ``root``.

    They are of single keys: a section that is set as a whole loses what the recipe says in it.
    """
    return [
        f"collection={root / 'tiny-collection'}",
        f"encoder={{model: {root / 'tiny-encoder'}, max_length: 24}}",
        f"student.mode={mode}",
        "student.layers=[1]",
        "candidates.depth=20",
        "candidates.window=[1, 10]",
        "candidates.negatives=3",
        "teacher.max_length=48",
        f"teacher.fine_tune={{start: {root / 'tiny-encoder'}, batch_queries: 8}}",
        "schedule.epochs=4",
        "schedule.batch_queries=8",
        "schedule.learning_rate=0.003",
        "schedule.evaluations=2",
        "schedule.checkpoints=2",
        "evaluation.rerank_depth=5",
    ]
