"""The loop: it learns, it resumes to the bit, and it leaves the best weights behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_encoder

from retrieval_kd.collections.base import Document
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import LossSpec, ScheduleSpec, StudentSpec
from retrieval_kd.students.build import build_student
from retrieval_kd.training.batches import TrainingSet
from retrieval_kd.training.checkpoint import load_checkpoint, save_checkpoint
from retrieval_kd.training.dev import DevSet
from retrieval_kd.training.loop import BEST, LAST, train
from retrieval_kd.training.metrics import MetricsLog
from retrieval_kd.training.towers import DocumentTower, FrozenDocuments, LiveDocuments, encode_rows

SCHEDULE = ScheduleSpec(epochs=3, batch_queries=8, learning_rate=3e-3, evaluations=3, checkpoints=6, micro_tokens=64)
LOSSES = (LossSpec("listwise_kl", 1.0, {"student_temperature": 0.1}), LossSpec("embedding_regression", 1.0))


class Texts:
    """Random documents and queries over the tiny vocabulary."""

    name = "texts"

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.docs = {f"d{i}": " ".join(rng.choice(WORDS, size=8)) for i in range(20)}
        self.query_texts = {f"q{i}": " ".join(rng.choice(WORDS, size=4)) for i in range(24)}

    def documents(self) -> Any:
        return (Document(doc_id, "", text) for doc_id, text in self.docs.items())

    def contents(self, doc_ids: Any) -> dict[str, str]:
        return {doc_id: self.docs[doc_id] for doc_id in doc_ids}


def job(folder: Path, mode: str = "asymmetric", dropout: float = 0.0, losses: Any = LOSSES) -> tuple[TorchEncoder, Any]:
    """Train a one-layer student of a two-layer encoder whose own ranking is the judgement."""
    texts = Texts()
    start = tiny_encoder(layers=2)
    student = build_student(start, StudentSpec(mode=mode, layers=(1,), dropout=dropout), start.card)  # type: ignore[arg-type]
    ids = sorted(texts.docs)
    corpus = EncodedCorpus(ids, start.encode([texts.docs[i] for i in ids], "document"), start.card, "", "")
    query_ids = list(texts.query_texts)
    targets = start.encode(list(texts.query_texts.values()), "query")
    order = np.argsort(-(targets @ corpus.vectors.T), axis=1)
    best = {query_id: ids[row[0]] for query_id, row in zip(query_ids, order, strict=True)}
    lists = [
        CandidateList(q, (best[q], *(ids[j] for j in row[3 : 6 + i % 3])), (1, *([0] * (3 + i % 3))))
        for i, (q, row) in enumerate(zip(query_ids, order, strict=True))
    ]
    scores = [
        10 * np.asarray(corpus.vectors[[corpus.row_of[d] for d in item.doc_ids]] @ vector, np.float32)
        for item, vector in zip(lists, targets, strict=True)
    ]
    qrels = {query_id: {doc_id: 1} for query_id, doc_id in best.items()}
    data = TrainingSet(lists, texts.query_texts, scores, qrels, targets)
    pool = tuple(ids) if mode == "symmetric" else ()
    dev = DevSet(texts.query_texts, qrels, texts, None if pool else corpus, pool)  # type: ignore[arg-type]

    def documents(device: torch.device) -> DocumentTower:
        if mode == "asymmetric":
            return FrozenDocuments(corpus, device)
        return LiveDocuments(student, texts, corpus, 64, device)  # type: ignore[arg-type]

    summary = train(student, documents, data, dev, losses, SCHEDULE, seed=3, folder=folder)
    return student, summary


def curve(folder: Path) -> list[tuple[int, str, float]]:
    """Return what must be equal in two runs of one recipe; speeds are not."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["event"], row.get("loss", row.get("nDCG@10"))) for row in rows]


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_training_learns(tmp_path: Path, mode: str) -> None:
    """Without it the gradient could flow nowhere and the student would be the layer cut under another name."""
    _, summary = job(tmp_path, mode)
    rows = curve(tmp_path)
    losses = [value for _, event, value in rows if event == "train"]
    dev = [value for _, event, value in rows if event == "dev"]
    assert len(losses) == 9
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    # Nine steps move a symmetric student's documents too little to say anything about its ranking.
    assert mode == "symmetric" or max(dev) > dev[0]
    assert summary["dev_nDCG@10"] == max(dev[1:])


def test_the_best_weights_are_left_in_the_student(tmp_path: Path) -> None:
    """Without it the last weights would be exported under the best ones' figure."""
    student, summary = job(tmp_path)
    reference, _ = job(tmp_path / "again")
    from retrieval_kd.training.checkpoint import load_weights

    facts = load_weights(tmp_path / BEST, reference)
    assert facts == {"step": summary["best_step"], "nDCG@10": summary["dev_nDCG@10"]}
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name


@pytest.mark.parametrize("kill_at", [1, 5, 8])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, kill_at: int) -> None:
    """Without it a resumed run restarts at a higher loss (sentence-transformers#3756), with other dropout draws."""
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        import retrieval_kd.training.loop as loop
        from test_loop import job
        calls, assemble = [], loop.assemble
        def dying(*arguments):
            calls.append(1)
            if len(calls) > {kill_at}:
                os.kill(os.getpid(), signal.SIGKILL)
            return assemble(*arguments)
        loop.assemble = dying
        job(Path(sys.argv[1]), dropout=0.2)
        """
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed, summary = job(tmp_path / "a", dropout=0.2)
    whole, expected = job(tmp_path / "b", dropout=0.2)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert summary == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    """Without it a kill between the last step and the manifest would train the whole schedule once more."""
    _, first = job(tmp_path)
    before = curve(tmp_path)
    _, again = job(tmp_path)
    assert again == first
    assert curve(tmp_path) == before


def test_micro_batches_do_not_change_vectors_or_gradients() -> None:
    """Without it the memory budget would be a hyper-parameter of quality."""
    encoder = tiny_encoder()
    rows = encoder.tokenizer([" ".join(WORDS[i : i + 1 + i % 7]) for i in range(20)], "query")
    weights = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for budget in (10_000, 16):
        encoder.zero_grad()
        vectors = encode_rows(encoder, rows, budget, torch.device("cpu"))
        (vectors * weights).sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, many in zip(*gradients, strict=True):
        assert torch.allclose(one, many, atol=1e-5)


def test_each_document_is_encoded_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it shared negatives would cost a forward pass for every list they stand in."""
    seen: list[tuple[str, ...]] = []
    vectors = LiveDocuments.vectors

    def counted(self: LiveDocuments, doc_ids: Any) -> torch.Tensor:
        seen.append(tuple(doc_ids))
        return vectors(self, doc_ids)

    monkeypatch.setattr(LiveDocuments, "vectors", counted)
    job(tmp_path, "symmetric")
    assert len(seen) == 9
    assert all(len(ids) == len(set(ids)) <= 20 for ids in seen)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it one overflow would turn every weight into NaN and the run would go on to the end."""
    import retrieval_kd.training.loop as loop

    monkeypatch.setattr(loop, "_bound", lambda spec: lambda inputs: inputs["scores"].student.sum() * float("inf"))
    with pytest.raises(DataError, match=r"step 1: loss is .*listwise_kl .*lower schedule\.learning_rate"):
        job(tmp_path)


def test_torn_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    """Without it a torn file would end in a trace, and another student's weights could be trained on."""
    encoder = tiny_encoder()
    optimizer = torch.optim.AdamW(encoder.parameters())
    path = tmp_path / LAST
    save_checkpoint(path, encoder, optimizer, {"step": 1})
    other = tiny_encoder(layers=1)
    with pytest.raises(ArtifactError, match=r"last\.safetensors: holds another model's weights"):
        load_checkpoint(path, other, torch.optim.AdamW(other.parameters()))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"last\.safetensors: torn or not a checkpoint"):
        load_checkpoint(path, encoder, optimizer)


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Without it a resumed run would log its steps twice, the first time with a torn line."""
    with MetricsLog(tmp_path, None) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    with MetricsLog(tmp_path, 2) as log:
        log.write("train", 3, {"loss": 30.0})
    assert curve(tmp_path) == [(1, "train", 1.0), (2, "train", 2.0), (3, "train", 30.0)]
