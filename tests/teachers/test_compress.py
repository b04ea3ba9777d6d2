"""A smaller cross-encoder: which layers, what each stage reproduces, in which order, and a kill in the middle."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval_kd.artifacts import Artifact
from retrieval_kd.encoders.base import load_tokenizer
from retrieval_kd.errors import RecipeError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import CompressionStage, CompressSpec
from retrieval_kd.teachers import learning
from retrieval_kd.teachers.compress import RegressionLesson, compress_stage, cut_layers
from retrieval_kd.teachers.cross_encoder import CrossEncoder, load_classifier
from retrieval_kd.teachers.learning import ListTexts
from retrieval_kd.teachers.pairs import PairTokenizer

from .conftest import ModelMaker, TinyCollection

LISTS = [CandidateList(f"q{i}", (f"d{i}", f"d{i + 10}", f"d{i + 20}", f"d{39 - i}"), (1, 0, 0, 0)) for i in range(10)]
HIDDEN = CompressionStage("hidden", epochs=15, batch_queries=5, learning_rate=5e-3)
LOGITS = CompressionStage("logits", epochs=15, batch_queries=5, learning_rate=5e-3)


@pytest.fixture
def larger(make_model: ModelMaker) -> Path:
    """Return a cross-encoder of four layers."""
    return make_model("larger", num_hidden_layers=4, initializer_range=0.2)


def logged(artifact: Artifact, key: str) -> list[float]:
    """Return what was logged of each step under a key."""
    lines = [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines]


def losses(artifact: Artifact) -> list[float]:
    """Return the logged losses."""
    return logged(artifact, "loss")


def lesson(tiny: TinyCollection, folder: Path, target: str, layers: tuple[int, ...]) -> RegressionLesson:
    """Return a lesson by a folder's model."""
    model = load_classifier(folder)
    tokenizer = PairTokenizer(load_tokenizer(folder), model, 48)
    return RegressionLesson(ListTexts(tiny, LISTS, 3), tokenizer, model, target, layers)  # type: ignore[arg-type]


def test_all_layers_have_nothing_to_learn(larger: Path, tiny: TinyCollection) -> None:
    """Without it a state could be matched with another layer's, and the loss would fall all the same."""
    whole = cut_layers(load_classifier(larger), (0, 1, 2, 3)).eval()
    device = torch.device("cpu")
    for target in ("hidden", "logits"):
        of_all = lesson(tiny, larger, target, (0, 1, 2, 3))
        assert of_all.loss(whole, of_all.rows(range(10)), device)[0].item() == pytest.approx(0, abs=1e-8)
    first = cut_layers(load_classifier(larger), (0, 1)).eval()
    of_first = lesson(tiny, larger, "hidden", (0, 1))
    assert of_first.loss(first, of_first.rows(range(10)), device)[0].item() == pytest.approx(0, abs=1e-8)
    others = cut_layers(load_classifier(larger), (0, 3)).eval()
    of_others = lesson(tiny, larger, "hidden", (0, 3))
    assert of_others.loss(others, of_others.rows(range(10)), device)[0].item() > 1e-3


def test_losses_are_their_definition(larger: Path, tiny: TinyCollection) -> None:
    """Without it padding could count as tokens, and a list of many pairs more than one of few."""
    teacher = load_classifier(larger).eval()
    smaller = cut_layers(load_classifier(larger), (1, 3)).eval()
    of_hidden, of_logits = (lesson(tiny, larger, target, (1, 3)) for target in ("hidden", "logits"))
    rows = of_hidden.rows([2, 5])
    hidden, logits = [], []
    for pairs in rows:
        errors = []
        for row in pairs:
            inputs = {
                name: torch.tensor([ids]) for name, ids in (("input_ids", row.ids), ("token_type_ids", row.type_ids))
            }
            with torch.no_grad():
                ours = smaller(**inputs, output_hidden_states=True)
                theirs = teacher(**inputs, output_hidden_states=True)
            states = [
                (a - theirs.hidden_states[n]).square().mean()
                for a, n in zip(ours.hidden_states, (0, 2, 4), strict=True)
            ]
            errors.append((torch.stack(states).mean(), (ours.logits - theirs.logits).square().sum()))
        hidden.append(np.mean([float(error[0]) for error in errors]))
        logits.append(np.mean([float(error[1]) for error in errors]))
    device = torch.device("cpu")
    assert of_hidden.loss(smaller, rows, device)[0].item() == pytest.approx(sum(hidden), rel=1e-4)
    assert of_logits.loss(smaller, rows, device)[0].item() == pytest.approx(sum(logits), rel=1e-4)


def test_two_stages_bring_the_scores_nearer(larger: Path, tiny: TinyCollection, tmp_path: Path) -> None:
    """Without it each stage could run and the smaller model still rank as its cut did."""
    spec = CompressSpec(layers=(1, 3), negatives=3, stages=(HIDDEN, LOGITS))
    first = compress_stage(tiny, LISTS, larger, spec, 0, 48, 13, tmp_path / "hidden")
    second = compress_stage(tiny, LISTS, larger, spec, 1, 48, 13, tmp_path / "logits", start=first.path)
    assert losses(first)[-1] < 0.7 * losses(first)[0]
    assert losses(second)[-1] < 0.5 * losses(second)[0]
    teacher, student = CrossEncoder.load(str(larger), 48), CrossEncoder.load(str(second.path), 48)
    texts = tiny.contents([doc_id for item in LISTS for doc_id in item.doc_ids])
    pairs = [(tiny.queries()[item.query_id], texts[doc_id]) for item in LISTS for doc_id in item.doc_ids]
    cut_layers(model := load_classifier(larger), (1, 3)).save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_bytes((larger / "tokenizer.json").read_bytes())
    cut, wanted = CrossEncoder.load(str(tmp_path / "cut"), 48), teacher.score(pairs)
    assert np.square(student.score(pairs) - wanted).mean() < 0.5 * np.square(cut.score(pairs) - wanted).mean()
    assert student.parameters == sum(weights.numel() for weights in model.parameters()) < teacher.parameters
    assert not (second.path / learning.CHECKPOINT).exists()


def test_each_step_tells_how_far_it_ranks_as_the_larger_one(larger: Path, tiny: TinyCollection, tmp_path: Path) -> None:
    """Without it a smaller reranker's loss would fall and nobody know whether it ranks as its teacher does."""
    lists = [*LISTS[:4], *(replace(item, doc_ids=item.doc_ids[:2], labels=(1, 0)) for item in LISTS[4:])]
    spec = CompressSpec(layers=(1, 3), negatives=3, stages=(HIDDEN, LOGITS))
    whole_batch = replace(LOGITS, batch_queries=10)
    first = compress_stage(tiny, lists, larger, replace(spec, stages=(whole_batch,)), 0, 48, 13, tmp_path / "s")
    texts = tiny.contents([doc_id for item in lists for doc_id in item.doc_ids])
    cut = cut_layers(load_classifier(larger), (1, 3))
    cut.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").write_bytes((larger / "tokenizer.json").read_bytes())
    ours, theirs = (CrossEncoder.load(str(folder), 48) for folder in (tmp_path / "cut", larger))
    same = []
    for item in lists:
        pairs = [(tiny.queries()[item.query_id], texts[doc_id]) for doc_id in item.doc_ids]
        same.append(ours.score(pairs).argmax() == theirs.score(pairs).argmax())
    assert logged(first, "agreement_top1")[0] == pytest.approx(np.mean(same))
    assert logged(first, "agreement_kl")[-1] < logged(first, "agreement_kl")[0]
    assert logged(first, "agreement_kendall")[-1] > logged(first, "agreement_kendall")[0]
    hidden = compress_stage(tiny, lists, larger, spec, 0, 48, 13, tmp_path / "hidden")
    assert len(logged(hidden, "agreement_top1")) == 30
    # Measured, not learnt: no state depends on the head.
    before, after = (load_classifier(folder).classifier.weight for folder in (larger, hidden.path))
    assert torch.equal(before, after)


@pytest.mark.parametrize("stage", [HIDDEN, LOGITS], ids=["hidden", "logits"])
def test_a_killed_stage_ends_with_the_same_bits(
    stage: CompressionStage, larger: Path, tiny: TinyCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a crash would leave a reranker that nobody can make again."""
    spec = CompressSpec(layers=(0, 3), negatives=3, stages=(stage,))
    monkeypatch.setattr(learning, "CHECKPOINT_STEPS", 5)
    whole = compress_stage(tiny, LISTS, larger, spec, 0, 48, 13, tmp_path / "whole")
    errors, calls = RegressionLesson._errors, 0

    def dies(self: RegressionLesson, *arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return errors(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RegressionLesson, "_errors", dies)
        with pytest.raises(KeyboardInterrupt):
            compress_stage(tiny, LISTS, larger, spec, 0, 48, 13, tmp_path / "killed")
    assert (tmp_path / "killed" / learning.CHECKPOINT).is_file()
    resumed = compress_stage(tiny, LISTS, larger, spec, 0, 48, 13, tmp_path / "killed")
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert losses(resumed) == losses(whole)


def test_layers_that_are_not_there_are_refused(larger: Path, tiny: TinyCollection, tmp_path: Path) -> None:
    """Without it the error would name the student, whose layers are fine."""
    spec = CompressSpec(layers=(0, 4), stages=(LOGITS,))
    with pytest.raises(RecipeError, match=r"teacher.compress.layers: no layer 4, the model has 4 layers, 0 to 3"):
        compress_stage(tiny, LISTS, larger, spec, 0, 48, 13, tmp_path / "s")
