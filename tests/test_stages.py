"""Recipes of several stages on a tiny collection: what each starts from, what is reused, what is shown."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny import tiny_cross_encoder_folder, tiny_encoder_folder, tiny_overrides
from typer.testing import CliRunner

from retrieval_kd.cli.main import app
from retrieval_kd.encoders.card import Side
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.mining.bm25 import BM25Index
from retrieval_kd.recipes.loader import load_recipe
from retrieval_kd.runs import Shortlist, write_trec
from retrieval_kd.stages import Workspace
from retrieval_kd.teachers.onnx_reranker import OnnxReranker

STAGES: list[dict[str, Any]] = [
    {"name": "warmup", "schedule": {"epochs": 1}},
    {
        "name": "refreshed",
        "candidates": {
            "sources": ["bm25", {"kind": "student", "stage": "warmup"}],
            "filter": {"percentiles": [0, 90]},
            "strategy": "stratified",
        },
        "losses": ["listwise_kl"],
    },
    {
        "name": "hard",
        "candidates": {"sources": ["student"], "negatives": 8},
        "selection": {"kind": "disagreement", "teacher_rank": 4, "student_ranks": [2, 9]},
    },
]


def staged(tiny: Path, mode: str = "asymmetric", *more: str) -> list[str]:
    """Return the overrides that make a recipe of three stages; the later ones mine with the earlier ones' student."""
    return [*tiny_overrides(tiny, mode), f"stages={json.dumps(STAGES)}", *more]


def workspace(tiny: Path, *overrides: str, said: list[str] | None = None) -> Workspace:
    recipe = load_recipe("margin_mse", overrides)
    return Workspace(recipe, tiny / "artifacts", (said if said is not None else []).append)


def dev(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["nDCG@10"] for row in rows if row["event"] == "dev"]


def train_rows(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == "train"]


@pytest.mark.parametrize("mode", ["asymmetric", "symmetric"])
def test_a_stage_starts_from_the_best_weights_of_the_last(tiny: Path, mode: str) -> None:
    """Without it each stage would begin anew, and a curriculum would be its last stage alone."""
    stages = workspace(tiny, *staged(tiny, mode)).training
    assert [stage.spec.name for stage in stages] == ["warmup", "refreshed", "hard"]
    for earlier, later in itertools.pairwise(stages):
        # The first dev figure of a stage is taken before its first step.
        assert dev(later.folder)[0] == max(dev(earlier.folder)[1:])
        assert later.encoder.card.weights_hash != earlier.encoder.card.weights_hash
    assert stages[2].lists != stages[2].candidates
    assert len(stages[2].teacher_scores) == len(stages[2].lists) > 0


def test_the_student_of_a_stage_mines_for_the_next(tiny: Path) -> None:
    """Without it negatives that the student has learnt to tell apart would be drawn for ever."""
    warmup, refreshed, _ = workspace(tiny, *staged(tiny)).training
    report = refreshed.mined.summary
    assert {"student warmup", "bm25 + student warmup"} & set(report["kept"])
    assert report["removed"]["scored above the percentiles"] > 0
    assert set(report["scores"]) == {"positives", "negatives", "left out"}
    assert warmup.mined.summary["scores"] == {}


def test_stages_are_reused_and_a_changed_one_alone_is_made_again(tiny: Path) -> None:
    """Without it a changed last stage would train all of them again."""
    before = [stage.folder for stage in workspace(tiny, *staged(tiny)).training]
    said: list[str] = []
    same = workspace(tiny, *staged(tiny), said=said)
    assert [stage.folder for stage in same.training] == before
    assert said == []
    changed = workspace(tiny, *staged(tiny, "asymmetric", "stages.hard.schedule.epochs=2"), said=said)
    after = [stage.folder for stage in changed.training]
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    assert said == ["train the asymmetric student of stage hard"]


def test_training_anew_beside_an_unfinished_run_says_which_key_changed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a killed training started again with one key changed would go on from nothing without a word."""
    said: list[str] = []
    common = tiny_overrides(tiny, "asymmetric")
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_kd.training.loop.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        for epochs in ("schedule.epochs=4", "schedule.epochs=7"):
            recipe = load_recipe("leaf", [*common, epochs, "seed=5"])
            with pytest.raises(KeyboardInterrupt):
                _ = Workspace(recipe, tmp_path, said.append).last.folder
        with pytest.raises(KeyboardInterrupt):
            _ = Workspace(recipe, tmp_path, said.append).last.folder
    first, changed, resumed = (line for line in said if line.startswith("train"))
    assert first == resumed == "train the asymmetric student"
    assert changed.startswith("train the asymmetric student from the beginning: the unfinished train-")
    assert changed.endswith("was made otherwise (schedule.epochs: 4 -> 7)")


@pytest.mark.parametrize(
    "key",
    [
        "seed: 13 -> 5",
        "encoder.max_length: 24 -> 20",
        "candidates.negatives: 3 -> 2",
        'candidates.strategy: "random" -> "top"',
        "extra_texts.batch: 0 -> 4",
    ],
)
def test_every_key_of_a_recipe_is_told_of_an_unfinished_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Without it a key that reaches the student through its lists or vectors would change the run without a word."""
    monkeypatch.setattr("retrieval_kd.training.loop.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    said: list[str] = []
    name, _, value = key.partition(": ")
    for more in ([], [f"{name}={value.rpartition(' -> ')[2]}"]):
        recipe = load_recipe("leaf", [*tiny_overrides(tiny, "asymmetric"), *more])
        with pytest.raises(KeyboardInterrupt):
            _ = Workspace(recipe, tmp_path, said.append).last.folder
    (line,) = (line for line in said if line.startswith("train") and "unfinished" in line)
    assert line.endswith(f"was made otherwise ({key})")


def test_many_changed_keys_are_told_in_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the more of a killed training's keys were changed, the less would be said of it."""
    monkeypatch.setattr("retrieval_kd.training.loop.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    said: list[str] = []
    more = ["schedule.clip=2.0", "schedule.epochs=3", "schedule.warmup=0.2", "schedule.learning_rate=0.001", "seed=1"]
    for changed in ([], more):
        recipe = load_recipe("leaf", [*tiny_overrides(tiny, "asymmetric"), *changed])
        with pytest.raises(KeyboardInterrupt):
            _ = Workspace(recipe, tmp_path, said.append).last.folder
    (line,) = (line for line in said if line.startswith("train") and "unfinished" in line)
    assert line.endswith("(seed: 13 -> 1; schedule.epochs: 4 -> 3; schedule.learning_rate: 0.003 -> 0.001; and 2 more)")


def test_another_stage_left_unfinished_is_no_beginning_of_this_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a first stage would be said to differ from a second one that was killed, in its name."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_kd.training.loop.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        for name in ("one", "two"):
            recipe = load_recipe("leaf", [*tiny_overrides(tiny, "asymmetric"), f"stages=[{{name: {name}}}]", "seed=5"])
            with pytest.raises(KeyboardInterrupt):
                _ = Workspace(recipe, tmp_path, said.append).last.folder
    assert not any("unfinished" in line for line in said)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("cross_encoder", "teacher.members.0.max_length: 48 -> 40"),
        ("cross_encoder", "candidates.negatives: 3 -> 2"),
        ("pairwise", "candidates.negatives: 3 -> 2"),
    ],
)
def test_scoring_anew_beside_an_unfinished_store_says_which_key_changed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: str
) -> None:
    """Without it a killed scoring started again with one key changed would score it all again without a word."""
    overrides = [item for item in tiny_overrides(tiny, "asymmetric") if not item.startswith("teacher.")]
    model = tiny_cross_encoder_folder(tmp_path / "teacher")
    teacher = f"teacher={{normalise: none, members: [{{kind: {kind}, model: {model}, max_length: 48}}]}}"
    key, _, value = change.partition(": ")
    said: list[str] = []
    with monkeypatch.context() as patch:
        for reads in ("CrossEncoder.score", "PairwiseRanker.preferences"):
            patch.setattr(
                f"retrieval_kd.teachers.cross_encoder.{reads}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        for more in ([], [f"{key}={value.rpartition(' -> ')[2]}"]):
            changed = Workspace(load_recipe("margin_mse", [*overrides, teacher, *more]), tmp_path / "a", said.append)
            with pytest.raises(KeyboardInterrupt):
                _ = changed.last.teacher_scores
    first, again = (line for line in said if line.startswith(("score", "compare")))
    assert "unfinished" not in first
    assert again.endswith(f"was made otherwise ({change})")
    # What is scored next is no later part of that.
    changed.last.teacher.scores(changed.last.lists[:3], changed.training_queries)
    assert "unfinished" not in said[-1]


def test_a_stage_with_frozen_documents_trains_as_asymmetric_mode_does(tiny: Path) -> None:
    """Without it the cheap stage would encode documents after all, or learn another space than the next one's."""
    once = ["losses=[{name: embedding_regression}]", "schedule.evaluations=1"]
    stages = "stages=[{name: queries, frozen_documents: true}, {name: both, schedule: {epochs: 1}}]"
    queries, both = workspace(tiny, *tiny_overrides(tiny, "symmetric"), *once, stages).training
    asymmetric = workspace(tiny, *tiny_overrides(tiny, "asymmetric"), *once).last
    assert _weights(queries.folder) == _weights(asymmetric.folder) != _weights(both.folder)
    # A symmetric encoder all the same: what it left encodes both sides, and so is measured on dev.
    assert queries.encoder.card.role == "symmetric"
    assert queries.encoder.card.space_fingerprint != asymmetric.encoder.card.space_fingerprint
    assert dev(both.folder)[0] == dev(queries.folder)[-1]


@pytest.mark.parametrize("student", ["mode: asymmetric", "mode: symmetric, towers: separate"])
def test_documents_that_are_frozen_or_apart_are_not_frozen_again(student: str) -> None:
    """Without it the key would be read by nobody, or leave a document tower behind that the queries have left."""
    with pytest.raises(RecipeError, match="frozen_documents: only a symmetric student with shared towers"):
        load_recipe("leaf", [f"student={{{student}}}", "stages=[{name: one, frozen_documents: true}, {name: two}]"])


def _weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_stage_takes_as_many_extra_texts_as_its_steps_read(tiny: Path) -> None:
    """Without it every sentence of a large corpus would be encoded before a training that reads a few thousand."""
    of = ["losses=[{name: embedding_regression}]", "extra_texts={batch: 2}", "schedule.epochs=1"]
    few = workspace(tiny, *tiny_overrides(tiny, "asymmetric"), *of, "schedule.epoch_queries=20").last
    many = workspace(tiny, *tiny_overrides(tiny, "asymmetric"), *of).last
    # Batches of 8: three steps for 20 queries, six for all 48.
    assert (len(few.extra_texts), len(many.extra_texts)) == (6, 12)


def test_one_stage_under_a_name_is_the_recipe_itself(tiny: Path) -> None:
    """Without it stages would be a second path through training, with results of their own."""
    plain = workspace(tiny, *tiny_overrides(tiny, "asymmetric"))
    named = workspace(tiny, *tiny_overrides(tiny, "asymmetric"), "stages=[{name: only}]")
    assert named.last.folder == plain.last.folder


def test_a_given_run_is_a_source(tiny: Path, tmp_path: Path) -> None:
    """Without it a first stage that we do not have, such as SPLADE, could not be mined from."""
    plain = workspace(tiny, *tiny_overrides(tiny, "asymmetric"))
    bm25 = plain.first_stages(plain.recipe.candidates, lambda _: plain.encoder)[0]
    train = {query_id: ranking for query_id, ranking in bm25.run.items() if query_id in plain.training_queries}
    write_trec(tmp_path / "given.trec", train, "given")
    common = [*tiny_overrides(tiny, "asymmetric"), "candidates.strategy=top"]
    given = workspace(tiny, *common, f"candidates.sources=[{{kind: run, path: {tmp_path / 'given.trec'}}}]").last
    own = workspace(tiny, *common, "candidates.sources=[bm25]").last
    assert given.candidates == own.candidates
    assert set(given.mined.summary["kept"]) == {f"run {tmp_path / 'given.trec'}"}
    lines = [f"{query_id}\t{doc_id}\n" for query_id, ranking in train.items() for doc_id in ranking.doc_ids]
    (tmp_path / "top1000.tsv").write_text("".join(lines))
    published = workspace(tiny, *common, f"candidates.sources=[{{kind: run, path: {tmp_path / 'top1000.tsv'}}}]").last
    assert published.candidates == own.candidates
    write_trec(tmp_path / "given.trec", {"nobody": train["q0-2"]}, "given")
    stranger = workspace(tiny, *common, f"candidates.sources=[{{kind: run, path: {tmp_path / 'given.trec'}}}]").last
    with pytest.raises(DataError, match="query 'nobody' is not in"):
        _ = stranger.candidates


def test_ranking_for_mining_goes_on_with_the_first_missing_shard(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a kill after nine hours of ranking would cost nine hours."""
    monkeypatch.setattr("retrieval_kd.stages.workspace.RUN_QUERIES", 13)
    recipe = load_recipe("margin_mse", [*tiny_overrides(tiny, "asymmetric"), "candidates.sources=[bm25]"])
    ranked: list[int] = []
    search = BM25Index.search

    def dying(self: BM25Index, queries: Any, k: int) -> Any:
        if sum(ranked) == 39:
            raise KeyboardInterrupt
        ranked.append(len(queries))
        return search(self, queries, k)

    with monkeypatch.context() as patch:
        patch.setattr(BM25Index, "search", dying)
        with pytest.raises(KeyboardInterrupt):
            _ = Workspace(recipe, tmp_path).last.candidates
    monkeypatch.setattr(
        BM25Index, "search", lambda self, queries, k: ranked.append(len(queries)) or search(self, queries, k)
    )
    resumed = Workspace(recipe, tmp_path).last.candidates
    assert ranked == [13, 13, 13, 13, 8]
    assert resumed == Workspace(recipe, tmp_path / "whole").last.candidates


def test_a_training_query_is_encoded_once_by_the_large_encoder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mining, the targets and an ensemble all want it, and a large encoder takes hours over a million queries."""
    encoded: list[str] = []
    encode = OnnxEncoder.encode

    def counting(self: OnnxEncoder, texts: Sequence[str], side: Side, on_rows: Any = None) -> Any:
        if side == "query":
            encoded.extend(texts)
        return encode(self, texts, side, on_rows)

    recipe = load_recipe("margin_mse", [*tiny_overrides(tiny, "asymmetric"), "candidates.sources=[dense]"])
    given = Workspace(recipe, tmp_path)
    queries = given.training_queries
    assert given.encoder
    monkeypatch.setattr(OnnxEncoder, "encode", counting)
    assert given.last.candidates
    assert given.last.teacher_scores
    assert len(given.query_vectors.ids) == len(queries)
    assert sorted(encoded) == sorted([*queries.values(), *given.dev[0].values()])


def test_vectors_that_are_in_use_are_not_opened_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it every use of a student's vectors in a run would hash a whole corpus anew."""
    workspace = Workspace(load_recipe("leaf", tiny_overrides(tiny, "symmetric")), tiny / "artifacts")
    opened: list[Path] = []
    load = EncodedCorpus.load
    monkeypatch.setattr(EncodedCorpus, "load", lambda folder: opened.append(folder) or load(folder))
    held = workspace.documents_for(workspace.undistilled)
    assert workspace.documents_for(workspace.undistilled) is held
    assert opened.count(opened[-1]) == 1


def test_a_run_that_is_not_there_is_named_with_its_key(tiny: Path, tmp_path: Path) -> None:
    """Without it a mistyped path would not say which key of the recipe holds it."""
    missing = tmp_path / "missing.trec"
    given = workspace(tiny, *tiny_overrides(tiny, "symmetric"), f"candidates.sources=[{{kind: run, path: {missing}}}]")
    with pytest.raises(RecipeError, match=rf"candidates\.sources: {missing} is not a file"):
        _ = given.last.candidates


def test_dev_searches_the_same_documents_whatever_mines(tiny: Path, tmp_path: Path) -> None:
    """Without it a run over train alone would leave dev with nothing but right answers, and any student would win."""
    common = tiny_overrides(tiny, "symmetric")
    usual = workspace(tiny, *common)
    (tmp_path / "empty.trec").touch()
    given = workspace(tiny, *common, f"candidates.sources=[{{kind: run, path: {tmp_path / 'empty.trec'}}}]")
    assert given.dev_set.pool == usual.dev_set.pool
    assert len(given.dev_set.pool) > 2 * len(given.dev_set.queries)
    with pytest.raises(DataError, match=r"no list for 48 training queries \(48 no negative in the pool\); widen"):
        _ = given.last.candidates


def test_a_named_encoder_is_a_source(tiny: Path, tmp_path: Path) -> None:
    """Without it only the encoder that is distilled could mine, and its blind spots would stay."""
    other = tiny_encoder_folder(tmp_path / "other", seed=7)
    encoder = f"{{model: {other}, max_length: 12}}"
    overrides = [
        *tiny_overrides(tiny, "asymmetric"),
        f"candidates.sources=[dense, {{kind: dense, encoder: {encoder}}}]",
    ]
    report = workspace(tiny, *overrides).last.mined.summary
    assert {"dense", f"dense {other}"} <= set(report["kept"])


def test_a_selection_that_keeps_nothing_says_why(tiny: Path) -> None:
    """Without it a stage of no lists would end in a division by zero."""
    impossible = "stages.hard.selection={kind: disagreement, student_ranks: [90, 99]}"
    with pytest.raises(DataError, match=r"stage 'hard': selection keeps none of \d+ lists .*widen"):
        _ = workspace(tiny, *staged(tiny, "asymmetric", impossible)).last.folder


def test_prod_from_bi_encoder_to_ensemble_to_disagreement(tiny: Path, tmp_path: Path) -> None:
    """Without it PROD's parts could each work and its curriculum not: teachers in turn, no forgetting, hard queries."""
    cross_encoder = tiny_cross_encoder_folder(tmp_path / "ce")
    prod = [{"name": "prod", "options": {"temperature": 1.0}}]
    gently = [*prod, {"name": "learning_without_forgetting", "options": {"temperature": 1.0}}]
    small = {"model": str(cross_encoder), "max_length": 32, "encoder_weight": 0, "normalise": "none"}
    large = {"model": str(cross_encoder), "max_length": 32}
    stages = [
        {"name": "bi-encoder", "teacher": {"cross_encoder_weight": 0}, "losses": prod},
        {"name": "small", "teacher": small, "losses": gently, "candidates": {"sources": ["bm25", "student"]}},
        {"name": "ensemble", "teacher": large, "losses": gently},
        {
            "name": "data", "teacher": large, "losses": gently, "candidates": {"negatives": 8},
            "selection": {"kind": "disagreement", "teacher_rank": 5, "student_ranks": [2, 9]},
        },
    ]  # fmt: skip
    overrides = [*tiny_overrides(tiny, "asymmetric"), f"stages={json.dumps(stages)}", "schedule.epochs=1"]
    bi_encoder, *later = workspace(tiny, *overrides).training
    assert list(train_rows(bi_encoder.folder)[0]["losses"]) == ["prod"]
    for stage in later:
        kept = [row["losses"]["learning_without_forgetting"] for row in train_rows(stage.folder)]
        # The first step compares the student with itself.
        assert abs(kept[0]) < 1e-6 < max(kept[1:])
    assert len(later[-1].lists) < len(later[-1].candidates)


@pytest.fixture
def joint(tiny: Path, tmp_path: Path) -> list[str]:
    """The overrides of a recipe whose cross-encoder learns along, scored as none was before."""
    teacher = tiny_cross_encoder_folder(tmp_path / "teacher")
    return [
        *tiny_overrides(tiny, "asymmetric"),
        f"teacher={{model: {teacher}, max_length: 32, encoder_weight: 0, normalise: none}}",
        "losses=[{name: joint_listwise}]",
        "joint=1e-3",
        "schedule.epochs=1",
    ]


def test_a_reranker_learns_along_and_is_exported(tiny: Path, joint: list[str]) -> None:
    """Without it RocketQAv2 would leave a student, and the reranker it was trained with would be lost."""
    stage = workspace(tiny, *joint).last
    trained, start = stage.reranker, stage.teacher
    assert trained is not None
    assert trained.folder == stage.folder / "reranker"
    shortlist = [Shortlist(item.query_id, item.doc_ids) for item in stage.candidates[:4]]
    texts = stage._workspace.training_queries
    before, after = (teacher.scores(shortlist, texts) for teacher in (start, trained))
    assert all(np.abs(one - other).max() > 1e-4 for one, other in zip(before, after, strict=True))
    contents = stage._workspace.collection.contents(shortlist[0].doc_ids)
    pairs = [contents[doc_id] for doc_id in shortlist[0].doc_ids]
    assert stage.reranker_export is not None
    exported = OnnxReranker.load(stage.reranker_export)
    np.testing.assert_allclose(exported.score(texts[shortlist[0].query_id], pairs), after[0], atol=1e-4)


def test_a_joint_stage_needs_one_cross_encoder_and_its_loss(joint: list[str]) -> None:
    """Without it an ensemble would be trained by halves, or a reranker saved that nothing had taught."""
    with pytest.raises(RecipeError, match="the teacher must be one cross-encoder"):
        _ = load_recipe("margin_mse", [*joint, "teacher.encoder_weight=0.5", "teacher.normalise=zscore"]).training
    with pytest.raises(RecipeError, match="no loss teaches the teacher; name joint_listwise"):
        _ = load_recipe("margin_mse", [*joint, "losses=[listwise_kl]"]).training
    with pytest.raises(RecipeError, match="whose scores it reads; set its teacher to scores"):
        _ = load_recipe("margin_mse", [*joint, "losses=[{name: joint_listwise, teacher: encoder}]"]).training


def test_a_stage_after_the_joint_one_leaves_its_reranker(tiny: Path, joint: list[str], tmp_path: Path) -> None:
    """Without it a last stage that polishes the student would lose the reranker of the stage before it."""
    stages = [
        {"name": "both", "losses": ["joint_listwise"], "joint": {"learning_rate": 1e-3}},
        {"name": "polish", "losses": ["embedding_regression"]},
    ]
    overrides = [*joint, "joint=null", f"stages={json.dumps(stages)}"]
    polished = workspace(tiny, *overrides)
    of_stage = polished.training[0].reranker_export
    assert of_stage is not None
    assert polished.last.reranker_export is None
    verbs = ["margin_mse", "--json", *itertools.chain(*(["--set", item] for item in overrides))]
    assert json.loads(run(tiny, "export", *verbs))["reranker"]["folder"] == str(of_stage)
    report = json.loads(run(tiny, "run", *verbs, "--out", str(tmp_path / "run")))
    assert "jointly trained cross-encoder over BM25 top-5" in [system["name"] for system in report["systems"]]
    assert (tmp_path / "run" / "reranker").resolve() == of_stage.resolve()


def run(tiny: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--artifacts", str(tiny / "artifacts")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_verbs_work_on_every_stage(tiny: Path, tmp_path: Path) -> None:
    """Without it rkd mine and rkd train would speak of the last stage alone, and the report hide the others."""
    from retrieval_kd.recipes.loader import resolved

    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(resolved(load_recipe("margin_mse", staged(tiny)))))
    mined = json.loads(run(tiny, "mine", str(path), "--json"))
    assert list(mined) == ["warmup", "refreshed", "hard"]
    assert mined["warmup"]["queries"] == 48
    trained = json.loads(run(tiny, "train", str(path), "--json"))
    assert [facts["steps"] for facts in trained.values()] == [6, 24, trained["hard"]["steps"]]
    selection = trained["hard"]["selection"]
    assert selection["kept"] + sum(selection["removed"].values()) == selection["lists"] == 48
    text = run(tiny, "mine", str(path))
    assert re.search(r"^stage +refreshed$", text, flags=re.MULTILINE)
    assert "scored above the percentiles" in text
    out = tmp_path / "run"
    report = json.loads(run(tiny, "run", str(path), "--out", str(out), "--json"))
    assert list(report["training"]) == [
        f"margin_mse student (asymmetric), stage {name}" for name in ("1 warmup", "2 refreshed", "3 hard")
    ]
    assert all(len(curves) > 0 for curves in report["training"].values())
    again = ["run", str(path), "--out", str(out), "--artifacts", str(tiny / "artifacts")]
    done = CliRunner().invoke(app, [*again, "--set", "stages.hard.schedule.epochs=9", "--set", "seed=1"])
    assert "holds a run of another recipe (seed: 13 -> 1; stages.hard.schedule.epochs: 4 -> 9)" in str(done.exception)
    assert json.loads((out / "report.json").read_text()) == report
