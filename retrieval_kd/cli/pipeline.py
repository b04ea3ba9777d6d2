"""From a recipe's stages to its report: indexes, a served student, every system measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from eval.fidelity import agreement_entry, fidelity
from eval.report import write_report
from eval.results import SystemResult
from eval.systems import (
    BM25System,
    IndexSystem,
    RerankSystem,
    RunSystem,
    ScoredRerank,
    ServerSystem,
    System,
    assess,
    reranked,
)
from eval.tables import format_report
from index.build import build_index
from index.search import Searcher
from retrieval_kd.artifacts import Artifact, Spec, atomic_write, build, config_of, file_sha256, fingerprint
from retrieval_kd.changes import changes, shown
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import split_queries
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import ArtifactError, RecipeError, ServeError
from retrieval_kd.recipes.loader import resolved, section, to_yaml
from retrieval_kd.recipes.schema import CollectionSpec, Recipe
from retrieval_kd.runs import Ranking, Run, Shortlist
from retrieval_kd.stages import Workspace
from retrieval_kd.stages.teaching import Teaching
from serve.client import Hit, RetrievalClient

INDEX = "index"
ENCODER = "encoder"
STUDENT = "student"
TEACHER = "teacher"
RERANKER = "reranker"
DOCUMENT_ENCODER = "document-encoder"
SERVED_FIELDS = ("title", "text")
"""What a run's index stores with each document: what a reranker reads, and people want to see."""


def run_recipe(workspace: Workspace, out: Path, command: str) -> dict[str, Any]:
    """Run every stage of a recipe, evaluate what came out, and write the report into ``out``.

    ``out`` also gets links to the teacher, the document encoder, the trained student, its exported encoder
    and its index store, which has the documents' titles and texts, so that ``rkd serve OUT`` works; and to the
    exported reranker that learnt along, if any.

    Returns:
        The content of ``report.json``.

    Raises:
        ArtifactError: ``out`` holds a run of another recipe, finished or not; names the keys that differ.
    """
    recipe = workspace.recipe
    _require_same_recipe(out, recipe)
    spec = Spec(
        "report",
        config=resolved(recipe),
        inputs={"collection": workspace.collection.fingerprint, **_models(workspace)},
        seed=recipe.seed,
    )

    def work(folder: Path) -> Mapping[str, Any]:
        with atomic_write(folder / "recipe.yaml") as file:
            file.write(to_yaml(recipe))
        _evaluate(workspace, folder, command)
        # Both resolved: ".." of a link goes to the parent of what the link stands for.
        here = folder.resolve()
        return {name: os.path.relpath(target.resolve(), here) for name, target in _links(workspace).items()}

    def whole(finished: Artifact) -> bool:
        # A report may outlast what it speaks of.
        return all((out / target).exists() for target in finished.summary.values())

    artifact = build(out, spec, work, whole)
    for name, target in artifact.summary.items():
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target, target_is_directory=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _require_same_recipe(out: Path, recipe: Recipe) -> None:
    held = config_of(out)
    if held is None:
        return
    # Keys that recipes gained since the folder was written had their defaults then. What cannot be read is compared
    # as it is: the keys that differ say why.
    with contextlib.suppress(RecipeError):
        held = resolved(section(Recipe, held, ""))
    differences = changes(_without_words(held), _without_words(resolved(recipe)))
    if differences:
        raise ArtifactError(
            f"{out}: holds a run of another recipe ({shown(differences)}); give another folder with --out, or delete it"
        )


def _without_words(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a recipe says of itself: a corrected source makes no other run."""
    return {key: value for key, value in recipe.items() if key not in ("about", "source", "follows", "published")}


def show_report(report: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """Print the report: JSON for machines, the table and its notes for people."""
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(format_report(report))
    typer.echo(f"\n{out / 'report.html'}")


def ask_served(out: Path, text: str, k: int = 5) -> tuple[Hit, ...]:
    """Serve a run's folder for one question."""
    with serving(out / INDEX, out / ENCODER) as target, RetrievalClient(target) as client:
        return client.search(text=text, top_k=k).hits


@contextlib.contextmanager
def serving(store: Path, encoder: Path) -> Iterator[str]:
    """Run ``rkd serve`` on a free port in a process of its own and yield its address.

    Raises:
        ServeError: the server did not start; its own message says why.
    """
    verb = [sys.executable, "-m", "retrieval_kd.cli.main", "serve", str(store), "--encoder", str(encoder)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen([*verb, "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                server.wait()
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["no message"]
                raise ServeError(f"the server did not start: {said[-1]}")
            yield f"127.0.0.1:{json.loads(line)['port']}"
        finally:
            server.terminate()


def _evaluate(workspace: Workspace, folder: Path, command: str) -> None:
    recipe = workspace.recipe
    split = recipe.evaluation.split
    queries = split_queries(workspace.collection, split)
    qrels = workspace.collection.qrels(split)
    student = workspace.student

    def measured(system: System) -> SystemResult:
        typer.echo(f"» evaluate {system.name}", err=True)
        return assess(system, queries, qrels, recipe.evaluation.measures, recipe.evaluation.depth, recipe.seed)

    mode = recipe.student.mode
    bm25 = measured(BM25System(workspace.collection))
    baseline = measured(_over_index(workspace, workspace.encoder, workspace.encoder.card.name, "bi-encoder"))
    rerankers = [measured(system) for system in _rerankers(workspace, bm25.run or {}, queries)]
    start = measured(_over_index(workspace, workspace.undistilled, f"layer cut, undistilled ({mode})", "start"))
    name = f"{recipe.name} student ({mode})"
    offline = measured(_over_index(workspace, student, name, "student", fields=SERVED_FIELDS))
    with serving(_store(workspace), workspace.last.served_export) as target, RetrievalClient(target) as client:
        served = measured(ServerSystem(f"{name}, gRPC", client, workspace.collection, student.card.parameters))
    require_same_top_ten(offline.run or {}, served.run or {})
    write_report(
        folder,
        collection=workspace.collection.name,
        split=split,
        systems=[bm25, baseline, *rerankers, start, offline, served],
        documents=len(workspace.corpus.ids),
        baseline=baseline.name,
        training=_curves(workspace, offline.name),
        provenance={"command": command, "recipe": resolved(recipe), "collection": workspace.collection.fingerprint},
        notes=_notes(baseline, rerankers, start, offline, len(queries)),
        agreements=[
            agreement_entry(system.name, baseline.name, fidelity(system.run or {}, baseline.run or {}), None)
            for system in (start, offline)
        ],
        seed=recipe.seed,
    )


def _curves(workspace: Workspace, student: str) -> dict[str, Path]:
    """Return each stage's training metrics; the names of the curves sort in the order of the stages."""
    staged = bool(workspace.recipe.stages)
    return {
        f"{student}, stage {number} {stage.spec.name}" if staged else student: stage.folder / "metrics.jsonl"
        for number, stage in enumerate(workspace.training, start=1)
    }


def require_same_top_ten(offline: Run, served: Run) -> None:
    """Refuse a server that ranks otherwise than the offline path: the product's one promise.

    Raises:
        ServeError: names the first query whose top ten differ.
    """
    for query_id, ranking in offline.items():
        answered = served.get(query_id)
        if answered is None or answered.doc_ids[:10] != ranking.doc_ids[:10]:
            raise ServeError(f"query {query_id!r}: served and offline top ten differ; run with --debug and report it")


def _over_index(
    workspace: Workspace, encoder: OnnxEncoder, name: str, role: str, fields: Sequence[str] = ()
) -> IndexSystem:
    return IndexSystem(name, role, encoder, Searcher.open(_version(workspace, encoder, fields)))


def _version(workspace: Workspace, encoder: OnnxEncoder, fields: Sequence[str] = ()) -> Path:
    """Build the index that an encoder's queries search, tuned to those of dev, and return its version folder."""
    spec, queries = workspace.recipe.index, None
    if spec.kind != "exact":
        queries = workspace.encoded_queries(workspace.dev[0], encoder)
    corpus = workspace.documents_for(encoder)
    store = _store(workspace, encoder)
    return build_index(
        corpus, spec, store, encoder.card, queries=queries, collection=workspace.collection, fields=fields
    )


def _store(workspace: Workspace, encoder: OnnxEncoder | None = None) -> Path:
    """Return the store that an encoder's queries search: updates of what one run serves must not reach another's."""
    encoder = encoder or workspace.student
    identity = fingerprint(
        {
            "vectors": workspace.documents_for(encoder).fingerprint,
            "index": asdict(workspace.recipe.index),
            "queries": encoder.card.fingerprint,
        }
    )
    return workspace.root / f"index-{identity[:12]}"


def _rerankers(workspace: Workspace, first: Run, queries: Mapping[str, str]) -> Iterator[System]:
    """Yield the last stage's teacher, if any, over BM25's top documents, then the cross-encoder that learnt along."""
    if workspace.last.needs_teacher:
        yield from _reranking(workspace, workspace.last.teacher, "", first, queries)
    if workspace.reranking.reranker is not None:
        yield from _reranking(workspace, workspace.reranking.reranker, "jointly trained ", first, queries)


def _reranking(
    workspace: Workspace, teacher: Teaching, which: str, first: Run, queries: Mapping[str, str]
) -> Iterator[System]:
    """Yield each member that reads texts alone, then the ensemble."""
    depth = workspace.recipe.evaluation.rerank_depth
    tops = {query_id: ranking.top(depth) for query_id, ranking in first.items() if len(ranking)}
    lists = [Shortlist(query_id, top.doc_ids) for query_id, top in tops.items()]
    timed = [
        RerankSystem("timed", RunSystem("BM25", first), member.reranker, workspace.collection, depth)
        for member in teacher.members
        if member.reranker
    ]

    def system(name: str, values: list[Any], timed: RerankSystem | None) -> System:
        rankings: dict[str, Ranking] = {
            query_id: reranked(first[query_id], list_scores) for query_id, list_scores in zip(tops, values, strict=True)
        }
        return ScoredRerank(f"{which}{name} over BM25 top-{depth}", rankings, timed)

    readers = [
        (title, member) for title, member in zip(teacher.titles, teacher.members, strict=True) if member.reranker
    ]
    for (title, member), its_time in zip(readers, timed, strict=True):
        yield system(title, member.scores(lists, queries), its_time)
    if len(teacher.members) > 1 and all(member.scores_new_lists for member in teacher.members):
        yield system("teacher ensemble", teacher.scores(lists, queries), timed[0] if len(timed) == 1 else None)


def _notes(
    baseline: SystemResult, rerankers: list[SystemResult], start: SystemResult, student: SystemResult, queries: int
) -> list[str]:
    """Say in words what the table shows, the unflattering part included."""
    measure = next(iter(baseline.measures))
    # A baseline that finds nothing leaves nothing to keep.
    whole = baseline.measures[measure] or 1.0
    kept, undistilled = student.measures[measure] / whole, start.measures[measure] / whole
    notes = [
        f"The student keeps {kept:.1%} of {baseline.name}'s {measure}; its undistilled layer cut {undistilled:.1%}.",
        f"The served student ranked the same ten documents as the offline one for all {queries:,} queries.",
    ]
    notes.extend(
        f"The {system.name} ({system.measures[measure]:.3f}) is weaker here than {baseline.name} over the whole corpus "
        f"({baseline.measures[measure]:.3f})."
        for system in rerankers
        if system.measures[measure] < baseline.measures[measure]
    )
    return notes


def _models(workspace: Workspace) -> dict[str, str]:
    """Return the hashes of the models and files a recipe names, which may change under the same name."""
    recipe = workspace.recipe
    files: dict[str, str] = {}
    names = {"encoder": recipe.encoder.model}
    mined = {"the recipe": recipe.candidates}
    for stage in workspace.training:
        mined[stage.spec.name] = stage.spec.candidates
        for i, member in enumerate(stage.teacher.members):
            spec, where = member.spec, f"{member.spec.kind} {i} of {stage.spec.name}"
            names |= {where: spec.model, f"start of {where}": spec.fine_tune.start if spec.fine_tune else ""}
            if spec.path:
                files[where] = member.fingerprint
        for path in stage.spec.extra_texts.collections:
            files[f"extra texts of {stage.spec.name}: {path}"] = open_collection(CollectionSpec(path)).fingerprint
    for of, candidates in mined.items():
        for source in candidates.sources:
            if source.path:
                files[f"{source.name} of {of}"] = file_sha256(Path(source.path))
            if source.encoder:
                names[f"{source.name} of {of}"] = source.encoder.model
    return files | {role: _folder_hash(resolve_model(name)) for role, name in names.items() if name}


def _folder_hash(folder: Path) -> str:
    """Hash a model's weights, tokenizer and configuration."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    return fingerprint({str(path.relative_to(folder)): file_sha256(path) for path in files})


def _links(workspace: Workspace) -> dict[str, Path]:
    """Return what a run's folder links to, by the link's name."""
    links = {
        INDEX: _store(workspace),
        ENCODER: workspace.last.served_export,
        STUDENT: workspace.last.folder,
        DOCUMENT_ENCODER: workspace.last.document_export,
    }
    if workspace.last.needs_teacher:
        links[TEACHER] = workspace.last.teacher.folder
    joint = workspace.reranking
    if joint.reranker is not None and joint.reranker_export is not None:
        links[RERANKER] = joint.reranker_export
    return links
