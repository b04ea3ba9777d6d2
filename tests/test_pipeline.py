"""The whole path on a tiny collection with tiny models: every shipped recipe, and the promises on the way."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from shutil import copytree
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_collection_folder
from tiny import tiny_overrides as overrides
from typer.testing import CliRunner

from index.search import Searcher
from retrieval_kd.artifacts import MANIFEST, PLAN, write_json
from retrieval_kd.changes import changes
from retrieval_kd.cli import pipeline
from retrieval_kd.cli.main import app
from retrieval_kd.cli.pipeline import _models, _require_same_recipe, _store, _version
from retrieval_kd.collections import open_collection
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import ArtifactError
from retrieval_kd.recipes.loader import load_recipe, resolved, shipped_recipes
from retrieval_kd.recipes.schema import CollectionSpec
from retrieval_kd.runs import Shortlist, rank
from retrieval_kd.stages import Workspace
from retrieval_kd.teachers.cross_encoder import CrossEncoder
from retrieval_kd.teachers.onnx_reranker import OnnxReranker
from serve.client import Options, RetrievalClient

RECIPES = sorted(set(shipped_recipes()) - {"demo"})
MODES = ("asymmetric", "symmetric")
SIZES = {
    "path", "model", "start", "max_length", "mode", "layers", "depth", "window", "negatives", "comparisons",
    "epochs", "batch_queries", "learning_rate", "evaluations", "checkpoints", "rerank_depth",
}  # fmt: skip
"""What a collection of 72 documents and a model of two layers need otherwise: places, and how much of everything."""


def own_overrides(tiny: Path, name: str) -> list[str]:
    """Return what a recipe needs beyond the overrides that all share."""
    made = f"fine_tune: {{start: {tiny / 'tiny-encoder'}, batch_queries: 8}}"
    return {
        # Targets that move by themselves are made to stand, so that a falling loss means learning.
        "taid": ["losses.0.options.start=1.0"],
        "pair_distill": [f"teacher={{members: [{{kind: pairwise, comparisons: 4, max_length: 64, {made}}}]}}"],
        "margin_mse_pair": ["candidates.negatives=1"],
        "distil": ["schedule.evaluations=1"],
        "small_reranker": [
            "teacher.compress={layers: [1], stages: [{target: hidden, batch_queries: 8}, {target: logits}]}"
        ],
    }.get(name, [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_its_loss_falls(tiny: Path, name: str, mode: str) -> None:
    """Without it a recipe could name a loss whose inputs no stage makes, found only by its first user."""
    recipe = load_recipe(name, [*overrides(tiny, mode), *own_overrides(tiny, name)])
    workspace = Workspace(recipe, tiny / "artifacts")
    for stage in workspace.training:
        rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
        by_epoch: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            if row["event"] == "train":
                by_epoch[row["epoch"]].append(row["loss"])
        # Every epoch is over the same lists, so that their means differ by what was learned.
        last = max(by_epoch)
        assert last > 1
        assert fmean(by_epoch[last]) < fmean(by_epoch[1])
    card = workspace.student.card
    assert card.role == ("query" if mode == "asymmetric" else "symmetric")
    assert (card.space_fingerprint == workspace.encoder.card.fingerprint) == (mode == "asymmetric")


@pytest.mark.parametrize("name", RECIPES)
def test_what_trains_here_is_what_ships_but_for_its_size(tmp_path: Path, name: str) -> None:
    """Without it a recipe's sources, positives or scale of scores could be overridden, and nobody train what ships."""
    tried = load_recipe(name, [*overrides(tmp_path, "symmetric"), *own_overrides(tmp_path, name)])
    shipped = resolved(load_recipe(name))
    differing = {line.partition(":")[0].rpartition(".")[2] for line in changes(shipped, resolved(tried))}
    stood_still = {"start"} if name == "taid" else set()
    assert differing <= SIZES | stood_still


def test_only_pairs_without_a_score_are_scored(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a recipe with one more negative would pay for every pair again, hours on a real collection."""
    # Among the shared artifacts are scores of other tests' pairs, which need none either.
    workspace = Workspace(load_recipe("margin_mse", overrides(tiny, "asymmetric")), tmp_path)
    teacher, candidates = workspace.last.teacher.members[0], workspace.last.candidates
    before = teacher.scores(candidates, {})
    documents = [document.doc_id for document in workspace.collection.documents()]
    scored: list[int] = []
    score = CrossEncoder.score
    monkeypatch.setattr(
        CrossEncoder, "score", lambda self, pairs, *rest: scored.append(len(pairs)) or score(self, pairs)
    )
    assert all(map(np.array_equal, teacher.scores(candidates, {}), before))
    assert scored == []
    longer = [
        Shortlist(item.query_id, (*item.doc_ids, next(doc for doc in documents if doc not in item.doc_ids)))
        for item in candidates
    ]
    after = teacher.scores(longer, {})
    assert sum(scored) == len(longer)
    assert all(np.array_equal(new[:-1], old) and np.isfinite(new).all() for new, old in zip(after, before, strict=True))


def test_the_matrix_of_recipes_is_whole() -> None:
    """Without it a recipe left out of the package would leave the test above green."""
    assert len(RECIPES) * len(MODES) >= 44


def test_training_leaves_the_undistilled_baseline_alone(tiny: Path) -> None:
    """Without it the row that shows what distillation bought could be the trained student under another name."""
    workspace = Workspace(load_recipe("leaf", [*overrides(tiny, "asymmetric"), "seed=99"]), tiny / "artifacts")
    trained = workspace.student.card.weights_hash
    assert workspace.undistilled.card.weights_hash == workspace.untrained_student().card.weights_hash != trained


@pytest.mark.parametrize("mode", MODES)
def test_rkd_run_from_recipe_to_report(tiny: Path, mode: str) -> None:
    """Without it the stages could each work and the product not: served and offline rankings, report, links, reuse."""
    out = tiny / f"run-{mode}"
    arguments = ["run", "margin_mse", "--out", str(out), "--artifacts", str(tiny / "artifacts"), "--json"]
    for override in overrides(tiny, mode):
        arguments += ["--set", override]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert {"collection", "split", "measures", "systems"} <= set(report)
    needed = {"name", "role", "nDCG@10", "RR@10", "R@100", "queries", "params", "encode_ms_p50", "bytes_per_doc"}
    assert all(needed <= set(system) for system in report["systems"])
    roles = [system["role"] for system in report["systems"]]
    assert roles == ["bm25", "bi-encoder", "reranker", "reranker", "start", "student", "server"]
    assert {system["queries"] for system in report["systems"]} == {12}
    student, served = report["systems"][-2:]
    assert served["nDCG@10"] == student["nDCG@10"]
    assert any("same ten documents" in note for note in report["notes"])
    assert (out / "index" / "CURRENT").is_file()
    assert (out / "encoder" / "model.onnx").is_file()
    assert (out / "student" / "modules.json").is_file()
    html = (out / "report.html").read_text()
    assert "margin_mse student" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    before = (out / "report.json").stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert (out / "report.json").stat().st_mtime_ns == before


def test_a_served_run_reranks_and_shows_the_texts(tiny: Path) -> None:
    """Without it a run could bring a reranker that its own index gives nothing to read."""
    out, query = tiny / "run-reranked", "w1 w2 w3"
    arguments = ["run", "rocketqa_v2", "--out", str(out), "--artifacts", str(tiny / "artifacts"), "--json"]
    for override in [*overrides(tiny, "asymmetric"), *own_overrides(tiny, "rocketqa_v2")]:
        arguments += ["--set", override]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    # What is stored for people and rerankers is no part of what systems are compared by.
    systems = json.loads(done.stdout)["systems"]
    sizes = {system["bytes_per_doc"] for system in systems if system["role"] in ("start", "student")}
    assert len(sizes) == 1
    verb = [sys.executable, "-m", "retrieval_kd.cli.main", "serve", str(out), "--port", "0", "--json"]
    with subprocess.Popen(verb, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            target = f"127.0.0.1:{json.loads(server.stdout.readline())['port']}"
            with RetrievalClient(target, timeout=60) as client:
                found = client.search(query, top_k=9)
                hits = client.search(query, top_k=5, options=Options(fields=["title", "text"], rerank_depth=9)).hits
        finally:
            server.terminate()
    texts = open_collection(CollectionSpec(str(tiny / "tiny-collection"))).contents(hit.doc_id for hit in found.hits)
    logits = OnnxReranker.load(out / "reranker").score(query, list(texts.values()))
    expected = rank(list(texts), logits, 5)
    assert [hit.doc_id for hit in hits] == list(expected.doc_ids)
    assert [hit.score for hit in hits] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert [hit.fields for hit in hits] == [{"title": "", "text": texts[hit.doc_id]} for hit in hits]


def test_what_a_recipe_names_decides_whether_its_report_is_made_again(tiny: Path, tmp_path: Path) -> None:
    """Without it a run whose files were replaced would be called done, and its old report shown as the new one."""
    run, preferences = tmp_path / "first.trec", tmp_path / "preferences.parquet"
    other = copytree(tiny / "tiny-collection", tmp_path / "other")
    encoder = copytree(tiny / "tiny-encoder", tmp_path / "encoder")
    recipe = load_recipe(
        "pair_distill",
        [
            *overrides(tiny, "asymmetric"),
            f"teacher={{normalise: none, members: [{{kind: pairwise, path: {preferences}}}]}}",
            f"candidates.sources=[{{kind: run, path: {run}}}, {{kind: dense, encoder: {{model: {encoder}}}}}]",
            f"extra_texts={{batch: 2, collections: [{other}]}}",
        ],
    )

    def named(probability: float, document: str) -> dict[str, str]:
        row = {"query_id": ["q0-2"], "doc_i": ["d0-1"], "doc_j": ["d0-2"], "p": [probability]}
        pq.write_table(pa.table(row), preferences)
        run.write_text(f"q0-2 Q0 {document} 1 1.0 x\n")
        return _models(Workspace(recipe, tmp_path / "artifacts"))

    seen = [named(0.5, "d0-1"), named(0.6, "d0-1"), named(0.6, "d0-2")]
    with (other / "queries.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "w1"}\n')
    seen.append(named(0.6, "d0-2"))
    (encoder / "config.json").write_text("{}")
    seen.append(named(0.6, "d0-2"))
    assert [set(before) for before in seen[1:]] == [set(seen[0])] * 4
    changed = [{name for name in before if before[name] != after[name]} for before, after in itertools.pairwise(seen)]
    assert changed == [
        {"pairwise 0 of train"},
        {f"run {run} of {of}" for of in ("the recipe", "train")},
        {f"extra texts of train: {other}"},
        {f"dense {encoder} of {of}" for of in ("the recipe", "train")},
    ]


@pytest.mark.parametrize("file", [MANIFEST, PLAN])
def test_a_folder_from_before_a_key_was_added_holds_the_same_recipe(tmp_path: Path, file: str) -> None:
    """Without it ``rkd run`` would refuse its own folders after an upgrade that adds a key or mends a source."""
    stages = ["stages=[{name: warmup}, {name: hard}]"]
    held = resolved(load_recipe("margin_mse", stages))
    for section in (held, *held["stages"]):
        del section["schedule"]["precision"]
    del held["evaluation"]["rerank_depth"]
    held["published"] = "a figure misread"
    write_json(tmp_path / file, {"config": held})
    _require_same_recipe(tmp_path, load_recipe("margin_mse", stages))
    for setting, told in (
        ("evaluation.rerank_depth=7", "evaluation.rerank_depth: 100 -> 7"),
        ("stages.hard.schedule.precision=bf16", 'stages.hard.schedule.precision: "fp32" -> "bf16"'),
    ):
        with pytest.raises(ArtifactError, match=re.escape(f"another recipe ({told});")):
            _require_same_recipe(tmp_path, load_recipe("margin_mse", [*stages, setting]))


def test_a_folder_of_a_key_that_recipes_lost_is_told_by_that_key(tmp_path: Path) -> None:
    """Without it a folder whose recipe can no longer be read would be taken for one of the same recipe."""
    recipe = load_recipe("margin_mse")
    write_json(tmp_path / MANIFEST, {"config": {**resolved(recipe), "gone": 1}})
    with pytest.raises(ArtifactError, match=r"another recipe \(gone: 1 -> absent\);"):
        _require_same_recipe(tmp_path, recipe)


@pytest.fixture
def evaluated(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workspace, Path, list[Path]]:
    """Return a workspace, the one artifact that its runs link to, and the folders that were evaluated."""
    artifact, folders = tmp_path / "artifacts" / "student-1", list[Path]()

    def evaluate(_: Workspace, folder: Path, __: str) -> None:
        artifact.mkdir(parents=True, exist_ok=True)
        (folder / "plots").mkdir()
        write_json(folder / "report.json", {"number": len(folders)})
        folders.append(folder)

    monkeypatch.setattr(pipeline, "_evaluate", evaluate)
    monkeypatch.setattr(pipeline, "_links", lambda _: {"student": artifact})
    return Workspace(load_recipe("leaf", overrides(tiny, "asymmetric")), artifact.parent), artifact, folders


def test_a_run_whose_student_was_deleted_is_made_again(
    tmp_path: Path, evaluated: tuple[Workspace, Path, list[Path]]
) -> None:
    """Without it a run's folder would be refused as a stranger's for ever once an artifact was deleted."""
    workspace, artifact, folders = evaluated
    out = tmp_path / "run"
    assert pipeline.run_recipe(workspace, out, "") == pipeline.run_recipe(workspace, out, "") == {"number": 0}
    artifact.rmdir()
    assert pipeline.run_recipe(workspace, out, "") == {"number": 1}
    assert (out / "student").resolve() == artifact.resolve()
    assert folders == [out, out]


def test_a_run_under_a_linked_folder_finds_its_student(
    tmp_path: Path, evaluated: tuple[Workspace, Path, list[Path]]
) -> None:
    """Without it a run is refused after hours, when its results lie under a link to another disk."""
    workspace, artifact, folders = evaluated
    (tmp_path / "disk" / "of" / "results").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "of" / "results")
    out = tmp_path / "link" / "run"
    for _ in range(2):
        pipeline.run_recipe(workspace, out, "")
        assert (out / "student").resolve() == artifact.resolve()
    assert len(folders) == 1


def test_another_kind_of_index_has_a_store_of_its_own(tiny: Path) -> None:
    """Without it ``rkd serve`` on an earlier run's folder would serve the index of whichever recipe ran last."""

    def store(*more: str) -> Path:
        recipe = load_recipe("leaf", [*overrides(tiny, "asymmetric"), *more])
        workspace = Workspace(recipe, tiny / "artifacts")
        return _store(workspace, workspace.encoder)

    assert store() == store("seed=5") != store("index.kind=hnsw")


def test_updates_of_one_student_do_not_reach_another_over_the_same_vectors(tiny: Path, tmp_path: Path) -> None:
    """Without it a document deleted through one run's service would be missing from the next run's report."""
    workspace = Workspace(load_recipe("leaf", [*overrides(tiny, "asymmetric"), "index.kind=hnsw"]), tmp_path)
    cut = workspace.untrained_student()
    cut.move_to_space_of(workspace.encoder.card, "query")
    student = OnnxEncoder.load(workspace.export(cut))
    assert workspace.documents_for(student).fingerprint == workspace.documents_for(workspace.encoder).fingerprint
    with Searcher.open(_version(workspace, student)) as served:
        served.delete(["d0-1"])
    with Searcher.open(_version(workspace, workspace.encoder)) as other:
        assert other.count == len(workspace.corpus.ids)
    with Searcher.open(_version(workspace, student)) as own:
        assert own.count == len(workspace.corpus.ids) - 1


def test_collections_side_by_side_keep_their_dev_queries(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it two collections under one ``--artifacts`` would each encode its dev queries over the other's."""
    other = tiny_collection_folder(tmp_path / "other", seed=1)
    tuned = [*overrides(tiny, "asymmetric"), "index.kind=hnsw"]
    workspaces = [
        Workspace(load_recipe("leaf", [*tuned, *more]), tmp_path / "artifacts")
        for more in ([], [f"collection={other}"])
    ]
    assert workspaces[0].dev[0] != workspaces[1].dev[0]
    versions = [_version(workspace, workspace.encoder) for workspace in workspaces]
    monkeypatch.delattr(OnnxEncoder, "encode")
    assert [_version(workspace, workspace.encoder) for workspace in workspaces] == versions
