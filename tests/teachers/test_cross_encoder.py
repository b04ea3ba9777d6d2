"""The cross-encoder: raw logits, the same alone and in a batch, and scoring that survives a kill."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval_kd.errors import ArtifactError, DataError, RecipeError
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.scores.store import ScoreStore
from retrieval_kd.teachers import onnx_classifier
from retrieval_kd.teachers.cross_encoder import CrossEncoder
from retrieval_kd.teachers.onnx_classifier import OnnxClassifier
from retrieval_kd.teachers.scoring import score_candidates

from .conftest import ModelMaker, TinyCollection

REAL = Path(__file__).resolve().parents[2] / "../shared/models/ce-minilm-l6"


def all_pairs(tiny: TinyCollection) -> list[tuple[str, str]]:
    """Return every query with every document, as texts."""
    return [(query, document.content) for query in tiny.queries().values() for document in tiny.documents()]


def candidate_lists() -> list[CandidateList]:
    """Return a list for each query; lists overlap in documents, and each pair is new."""
    return [CandidateList(f"q{i}", (f"d{i}", *(f"d{j}" for j in range(10, 40))), (1,) + (0,) * 30) for i in range(10)]


def test_logits_are_those_of_transformers(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """Wrong type ids, truncation or padding change every score a little and break nothing visibly."""
    from transformers import AutoModelForSequenceClassification, BertTokenizerFast

    folder = make_model()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    pairs = all_pairs(tiny)[:60]
    inputs = tokenizer(
        [q for q, _ in pairs],
        [d for _, d in pairs],
        padding=True,
        truncation="longest_first",
        max_length=24,
        return_tensors="pt",
    )
    assert inputs["token_type_ids"].max() == 1
    assert inputs["input_ids"].shape[1] == 24
    with torch.no_grad():
        expected = model(**inputs).logits[:, 0].numpy()
    np.testing.assert_allclose(CrossEncoder.load(str(folder), 24).score(pairs), expected, atol=1e-5)


def test_the_configured_sigmoid_is_ignored(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A sigmoid named by the folder would squash the margins into 0..1 (sentence-transformers#1546)."""
    sigmoid = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
    scores = CrossEncoder.load(str(make_model(**sigmoid)), 64).score(all_pairs(tiny)[:20])
    assert scores.dtype == np.float32
    assert scores.min() < 0 or scores.max() > 1


def test_a_score_does_not_depend_on_its_batch(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A mask that leaks padding would make a teacher's opinion depend on its neighbours."""
    teacher = CrossEncoder.load(str(make_model()), 64)
    pairs = all_pairs(tiny)
    together = teacher.score(pairs)
    order = np.random.default_rng([1]).permutation(len(pairs))
    np.testing.assert_allclose(teacher.score([pairs[i] for i in order]), together[order], atol=1e-5)
    alone = [teacher.score([pairs[i]])[0] for i in order[:20]]
    np.testing.assert_allclose(alone, together[order[:20]], atol=1e-5)


def test_every_pair_is_counted_once(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A bar that runs past its end, or chunks that overlap, would show here."""
    counts: list[int] = []
    teacher = CrossEncoder.load(str(make_model()), 64)
    assert teacher.score(all_pairs(tiny), counts.append).shape == (400,)
    assert sum(counts) == 400
    assert teacher.score([]).shape == (0,)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score as a machine without a GPU does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def torch_logits(teacher: CrossEncoder, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Return what torch gives, in one padded batch."""
    inputs = teacher._tokenizer.batch(teacher._tokenizer(pairs), torch.device("cpu"))
    with torch.no_grad():
        return teacher._model(**inputs).logits[:, 0].numpy()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("family", "options"), [("bert", {}), ("distilbert", {}), ("roberta", {"type_vocab_size": 1})])
def test_on_a_cpu_the_graph_gives_the_logits_of_torch(
    family: str,
    options: dict[str, int],
    make_model: ModelMaker,
    tiny: TinyCollection,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Families differ in their inputs and in what can be fused; falling back would pass for slow hardware."""
    teacher = CrossEncoder.load(str(make_model(family=family, **options)), 48)
    pairs = all_pairs(tiny)[::8]
    fingerprint = teacher.fingerprint
    capfd.readouterr()
    scores = teacher.score(pairs)
    assert isinstance(teacher._scorer, OnnxClassifier)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])
    expected = torch_logits(teacher, pairs)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert teacher.fingerprint == fingerprint


@pytest.mark.usefixtures("on_cpu")
def test_a_teacher_that_starts_in_the_middle_gives_the_same_bytes(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A resumed run checks the graph on other pairs; that must not show in the scores."""
    pairs = all_pairs(tiny)
    folder = str(make_model())
    first, resumed = CrossEncoder.load(folder, 64), CrossEncoder.load(folder, 64)
    first.score(pairs[:100])
    assert first.score(pairs[100:200]).tobytes() == resumed.score(pairs[100:200]).tobytes()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_graph_that_disagrees_gives_way_to_torch(
    error: float,
    make_model: ModelMaker,
    tiny: TinyCollection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wrong fusion would teach every student a ranker that nobody measured."""
    answer = OnnxClassifier.__call__

    def spoiled(self: OnnxClassifier, **inputs: torch.Tensor) -> object:
        output = answer(self, **inputs)
        output.logits[-1] += error
        return output

    monkeypatch.setattr(OnnxClassifier, "__call__", spoiled)
    teacher = CrossEncoder.load(str(make_model()), 64)
    pairs = all_pairs(tiny)[:40]
    for _ in range(2):
        np.testing.assert_allclose(teacher.score(pairs), torch_logits(teacher, pairs), rtol=0, atol=1e-5)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "tiny-ce: scoring with torch; the ONNX graph's logits differ by" in record.getMessage()


@pytest.mark.usefixtures("on_cpu")
def test_a_model_without_a_graph_is_scored_by_torch(
    make_model: ModelMaker, tiny: TinyCollection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator that ONNX lacks must cost speed, not the run."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(onnx_classifier, "trace", refuse)
    teacher = CrossEncoder.load(str(make_model()), 64)
    pairs = all_pairs(tiny)[:40]
    np.testing.assert_allclose(teacher.score(pairs), torch_logits(teacher, pairs), rtol=0, atol=1e-5)
    assert [r.getMessage() for r in caplog.records] == ["tiny-ce: scoring with torch; no ONNX graph: no such operator"]


def test_the_fingerprint_names_what_changes_a_score(make_model: ModelMaker, tmp_path: Path) -> None:
    """Scores of another length or other weights must not pass for this teacher's."""
    first = CrossEncoder.load(str(make_model()), 64)
    assert CrossEncoder.load(str(tmp_path / "tiny-ce"), 64).fingerprint == first.fingerprint
    assert CrossEncoder.load(str(tmp_path / "tiny-ce"), 32).fingerprint != first.fingerprint
    assert CrossEncoder.load(str(make_model("other", initializer_factor=2)), 64).fingerprint != first.fingerprint
    assert first.parameters > 0


def test_folders_that_are_no_teacher_are_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    """A random head, or the first of three labels, gives scores that look like scores."""
    with pytest.raises(ArtifactError, match="gives 3 numbers for a pair"):
        CrossEncoder.load(str(make_model("three", labels=3)), 64)
    with pytest.raises(ArtifactError, match=r"weight 'classifier.bias' is missing"):
        CrossEncoder.load(str(make_model("bare", labels=0)), 64)
    with pytest.raises(RecipeError, match="65 is more than the 64 positions"):
        CrossEncoder.load(str(make_model()), 65)
    (tmp_path / "tiny-ce" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"no tokenizer.json"):
        CrossEncoder.load(str(tmp_path / "tiny-ce"), 64)


def test_torn_weights_are_refused(make_model: ModelMaker) -> None:
    """A download cut short must not become a teacher."""
    weights = make_model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="cannot read the cross-encoder"):
        CrossEncoder.load(str(weights.parent), 64)


def test_candidates_become_a_store(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """Scores must come back under their own pair, whatever order shards and batches had."""
    teacher = CrossEncoder.load(str(make_model()), 64)
    lists = candidate_lists()
    artifact = score_candidates(teacher, tiny, [*lists, lists[0]], tmp_path / "s", pairs_per_shard=100)
    assert artifact.summary == {"pairs": 310, "queries": 10}
    assert [entry.path for entry in artifact.files] == [f"scores-0000{i}.parquet" for i in range(4)]
    assert artifact.config["max_length"] == 64
    assert artifact.inputs["teacher"] == teacher.fingerprint
    texts = tiny.contents(lists[3].doc_ids)
    expected = teacher.score([(tiny.queries()["q3"], texts[doc_id]) for doc_id in lists[3].doc_ids])
    (got,) = ScoreStore.open(tmp_path / "s").score_lists([lists[3]])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_unknown_ids_are_found_before_anything_is_scored(
    make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path
) -> None:
    """An unknown id in the last shard must not cost the hours before it."""
    teacher = CrossEncoder.load(str(make_model()), 64)
    for extra, message in (
        (CandidateList("q1", ("d1", "nowhere"), (1, 0)), "'nowhere'"),
        (CandidateList("nobody", ("d1", "d2"), (1, 0)), "no query 'nobody'"),
    ):
        with pytest.raises(DataError, match=message):
            score_candidates(teacher, tiny, [*candidate_lists(), extra], tmp_path / "s", pairs_per_shard=100)
        assert list((tmp_path / "s").glob("*.parquet")) == []
    with pytest.raises(DataError, match="no candidates"):
        score_candidates(teacher, tiny, [], tmp_path / "s")


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from teachers.conftest import TinyCollection
from teachers.test_cross_encoder import candidate_lists
from retrieval_kd.teachers.cross_encoder import CrossEncoder
from retrieval_kd.teachers.scoring import score_candidates
score_candidates(CrossEncoder.load(sys.argv[2], 64), TinyCollection(), candidate_lists(), Path(sys.argv[3]), 10)
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(make_model: ModelMaker, tiny: TinyCollection, tmp_path: Path) -> None:
    """A shard torn by SIGKILL, or shards cut elsewhere after it, would change the training set in silence."""
    model, killed = make_model(), tmp_path / "killed"
    tests = str(Path(__file__).resolve().parents[1])
    child = subprocess.Popen([sys.executable, "-c", _KILLED, tests, str(model), str(killed)])
    try:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("*.parquet"))) < 3:
            assert child.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.parquet")}
    assert 3 <= len(before) < 31
    assert not (killed / "manifest.json").exists()
    teacher = CrossEncoder.load(str(model), 64)
    resumed = score_candidates(teacher, tiny, candidate_lists(), killed, 10)
    whole = score_candidates(teacher, tiny, candidate_lists(), tmp_path / "whole", 10)
    assert [entry.sha256 for entry in resumed.files] == [entry.sha256 for entry in whole.files]
    assert {name: (killed / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.slow
def test_scores_are_those_of_sentence_transformers() -> None:
    """Users compare with the library they came from: same folder, same logits."""
    if not REAL.is_dir():
        pytest.skip("needs the cross-encoder in ../shared")
    import sentence_transformers

    pairs = [
        ("what is a bi-encoder", "A bi-encoder encodes query and document apart. " * n + "It is fast.")
        for n in range(9)
    ]
    peer = sentence_transformers.CrossEncoder(str(REAL), max_length=96, model_kwargs={"dtype": torch.float32})
    expected = peer.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(CrossEncoder.load(str(REAL), 96).score(pairs), expected, atol=1e-4)


def test_a_template_gives_the_logits_of_the_filled_string(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A model that was trained on a prompt and scored without it gives plausible, worse scores."""
    from transformers import AutoModelForSequenceClassification, BertTokenizerFast

    folder = make_model()
    template = "w1 {query} w2 {document} w3"
    pairs = [pair for pair in all_pairs(tiny) if len(pair[1].split()) < 40][:30]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    inputs = tokenizer([f"w1 {q} w2 {d} w3" for q, d in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[:, 0].numpy()
    teacher = CrossEncoder.load(str(folder), 64, template)
    np.testing.assert_allclose(teacher.score(pairs), expected, atol=1e-5)
    assert teacher.source.template == template
    assert teacher.fingerprint != CrossEncoder.load(str(folder), 64).fingerprint


def test_two_labels_are_stored_as_log_odds(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """The first of two logits, which is what a one-label reader takes, often grows with irrelevance."""
    from scipy.special import softmax

    from retrieval_kd.scores.normalise import activate

    folder = str(make_model("two", labels=2))
    pairs = all_pairs(tiny)[:20]
    teacher = CrossEncoder.load(folder, 64, activation="logit_difference")
    inputs = teacher._tokenizer.batch(teacher._tokenizer(pairs), torch.device("cpu"))
    with torch.no_grad():
        both = teacher._model(**inputs).logits.numpy()
    scores = teacher.score(pairs)
    np.testing.assert_allclose(scores, both[:, 1] - both[:, 0], atol=1e-5)
    np.testing.assert_allclose(activate(scores, "sigmoid"), softmax(both, axis=1)[:, 1], atol=1e-5)
    assert teacher.source.reading == "logit_difference"
    assert CrossEncoder.load(folder, 64, activation="sigmoid").fingerprint == teacher.fingerprint


def test_an_activation_has_to_fit_the_labels(make_model: ModelMaker) -> None:
    """A guess at which of two logits is meant would be right for half of the models."""
    with pytest.raises(RecipeError, match="2 labels does not go with activation identity; use logit_difference or"):
        CrossEncoder.load(str(make_model("two", labels=2)), 64)
    with pytest.raises(RecipeError, match="1 label does not go with activation logit_difference; use identity or"):
        CrossEncoder.load(str(make_model()), 64, activation="logit_difference")


def test_a_decoder_is_read_at_its_last_token(make_model: ModelMaker, tiny: TinyCollection) -> None:
    """A decoder pools its last token: padding taken for it would give every short pair the same score."""
    options = {"num_key_value_heads": 2, "head_dim": 8}
    teacher = CrossEncoder.load(str(make_model("decoder", family="qwen2", **options)), 48, "{document} w1 {query}")
    pairs = all_pairs(tiny)[:40]
    together = teacher.score(pairs)
    assert np.ptp(together) > 0.1
    np.testing.assert_allclose([teacher.score([pair])[0] for pair in pairs[::5]], together[::5], atol=1e-5)


def test_a_model_without_a_pad_token_is_refused(make_model: ModelMaker) -> None:
    """Padding with a real token would be read as text."""
    with pytest.raises(ArtifactError, match="no pad_token_id"):
        CrossEncoder.load(str(make_model("padless", family="qwen2", num_key_value_heads=2, pad_token_id=None)), 48)
