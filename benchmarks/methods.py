"""Every shipped method under one budget, on the same lists, and the table that ``docs/methods.md`` is made of.

``run`` trains the student of each recipe from the same start on the same candidate lists with the same number of
texts, batch and learning rate; nothing is tuned for one method. Each student is measured on the test split of the
collection it was trained on, and of collections it has not seen. A result is one JSON file with the value of every
query, so that intervals and tests can be made again. ``table`` reads the files and the recipes and writes the page.

    python benchmarks/methods.py run --collection DIR --zero-shot DIR --teacher MODEL --mode asymmetric
    python benchmarks/methods.py table
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.dense import DenseSystem, encoded
from eval.measures import Evaluation, evaluate
from eval.significance import Comparison, bootstrap_interval, compare
from retrieval_kd.artifacts import MANIFEST, atomic_write, fingerprint, producers
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import Collection, split_queries
from retrieval_kd.encoders.base import Encoder
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.recipes.loader import load_recipe, shipped_recipes
from retrieval_kd.recipes.schema import CollectionSpec, Recipe
from retrieval_kd.stages import Workspace
from retrieval_kd.stages.training import TrainingStage

MEASURE = "nDCG@10"
SPLIT = "test"
BASELINE = "margin_mse"
TEACHER, START = "all-MiniLM-L6-v2", "undistilled"
BATCH = 32
LARGEST_P = 0.05
RESULTS = Path(__file__).parent / "results" / "methods"
PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
NEEDS = {
    "encoder": "encoder",
    "judgements": "judgements",
    "scores": "teacher scores",
    "preferences": "pairwise teacher",
    "": "",
}
GOALS = {
    "best": {"msmarco-12k": 0.995, "scifact": 0.98, "nfcorpus": 0.98},
    "best-symmetric": {"msmarco-12k": 0.98, "scifact": 0.96, "nfcorpus": 0.96},
    "best-symmetric-one-stage": {"msmarco-12k": 0.98, "scifact": 0.96, "nfcorpus": 0.96},
    "static": {"msmarco-12k": 0.85},
}
"""What share of the large encoder's value each student is to keep."""
LIMITS = """\
What a student of three layers lacks is the fit to the large encoder's vectors. The fit still improves with texts and
steps, so computation limits it here: 325,048 texts are 72 minutes of one core, 20 of which encode them with the large
encoder. nDCG@10 hardly follows any more. On dev of msmarco-12k, where the large encoder has 0.868, eight passes over
the queries with phrases of three collections reach 0.862 and agree with it on 0.936 of the top documents (Kendall's
tau of the lists 0.73); four passes with the own documents' phrases, which is what ships, 0.863, 0.927 and 0.70. The
goals that are missed by less than one point lie within the intervals of the differences.

What an extra text is counts for more than how often it is read. Phrases of 3 to 14 words, as long as queries, cost a
third of sentences and vary more: with sentences, one of each document of three collections, as many texts as the
shipped recipe reads took the student to 0.860 on dev, and twice as many to 0.858. A static query encoder gains most:
0.828 on dev after 0.812 without extra texts.

Tried on dev without a gain: other layers to start from, a projection, larger batches, hidden states of every token
and of the layer between (at equal steps the error falls by 4 %, and a step takes 1.7 times as long), and queries made
of train queries and words of documents. Of the two symmetric students the one in one stage has 0.845 on dev, the one
in two stages 0.848: less than the noise of 594 queries apart. The second meets every goal. Its second stage gains with
length and with fewer extra texts beside the queries: one pass with 48 has 0.843 on dev, one with 16 questions 0.848,
two with 16 phrases 0.847 and three 0.848.

Documents of a larger encoder than the student's start, all-mpnet-base-v2 (dev 0.875), are not among these rows: its
vectors are some ten times as dear, and a student of MiniLM's layers begins in its space at 0.618.

The row of pair_distill in the asymmetric table is of comparisons drawn before each document was sure of one.

No student is above the large encoder itself. The cross-encoder alone, over BM25's best 100, is below it (0.860
against 0.872 on test); their mean is above it (0.883), but three thousand scored lists, or ten thousand judged train
queries against all 12,585 documents, did not carry that over to unseen queries: judged positives after distillation
gained nothing on dev (0.8565), and a linear map of both sides of the large encoder's own vectors, with its judged
train queries, lost (0.867 at best)."""
Result = Mapping[str, Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.verb == "table":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(read_results()), encoding="utf-8")
        return
    collections = [open_collection(CollectionSpec(path)) for path in (arguments.collection, *arguments.zero_shot)]
    for name in arguments.recipe or [TEACHER, START, *sorted(set(shipped_recipes()) - {"demo"})]:
        path = RESULTS / arguments.label / f"{name}.json"
        if not path.is_file():
            say(f"{name} ({arguments.mode})")
            store(path, measured(name, arguments, collections))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table", help="write docs/methods.md from recipes and stored results")
    run = verbs.add_parser("run", help="train and measure what has no result yet")
    run.add_argument("--collection", required=True, help="trained on, and measured on its test split")
    run.add_argument("--zero-shot", action="append", default=[], help="measured on its test split alone")
    run.add_argument("--teacher", required=True, help="the cross-encoder")
    run.add_argument(
        "--recipe", action="append", help=f"a recipe, the large encoder's name or {START!r}; all when none is given"
    )
    run.add_argument("--mode", choices=["asymmetric", "symmetric"], default="asymmetric")
    run.add_argument("--queries", type=int, default=2048, help="training queries that have lists")
    run.add_argument(
        "--passes", type=int, default=4096, help="query texts that a student is trained on, repeats counted"
    )
    run.add_argument("--negatives", type=int, default=7, help="at most this many in a list")
    run.add_argument("--learning-rate", type=float, default=2e-4)
    run.add_argument("--label", default="", help="folder of the results; the mode when not given")
    run.add_argument("--own-budget", action="store_true", help="leave lists and schedule as the recipe has them")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    run.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    arguments = parser.parse_args()
    if arguments.verb == "run":
        arguments.label = arguments.label or arguments.mode
    return arguments


def store(path: Path, result: Result) -> None:
    """Write a result as one line: thousands of values on lines of their own would drown every change to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(result, sort_keys=True) + "\n")


def say(text: str) -> None:
    sys.stderr.write(f"» {text}\n")


def measured(name: str, arguments: argparse.Namespace, collections: Sequence[Collection]) -> Result:
    """Train one recipe's student, or take a baseline, and measure it on every collection."""
    own = [f"collection={arguments.collection}", f"student.mode={arguments.mode}", *arguments.set]
    baseline = name not in shipped_recipes()
    recipe = load_recipe("leaf" if baseline else name, own)
    if recipe.training[-1].losses and not baseline and needs_model(recipe):
        own.append(f"teacher.model={arguments.teacher}")
    if not baseline and not arguments.own_budget:
        own += budget(load_recipe(name, own), arguments)
    recipe = load_recipe("leaf" if baseline else name, own)
    large = Path(recipe.encoder.model).name
    if baseline and name not in (large, START):
        raise SystemExit(f"{name}: neither a recipe nor {large}, the large encoder, nor {START}")
    workspace = Workspace(recipe, arguments.artifacts, say)
    query_encoder: Encoder
    cost: dict[str, Any] = {}
    if name == START:
        query_encoder = workspace.untrained_student()
    elif baseline:
        query_encoder = workspace.encoder
    else:
        # The clock is the student's: lists, the first stage's scores and whatever makes its teacher come before it. It
        # counts processor time, for wall time would tell of the machine's other work.
        for stage in workspace.training[:1]:
            _ = stage.candidates, stage.teacher_scores if stage.needs_teacher else None
        minutes = [minutes_to_train(stage) for stage in workspace.training]
        query_encoder = TorchEncoder.open(workspace.last.folder)
        cost = texts_seen(workspace.training)
        cost |= {"cpu_minutes": sum(minutes)} if all(minutes) else {}
    documents = document_encoder(workspace, query_encoder)
    return {
        "name": name,
        "mode": arguments.mode,
        "needs": "" if baseline else workspace.recipe.needs,
        "trained_on": "" if baseline else collections[0].name,
        "budget": {}
        if arguments.own_budget
        else {
            "queries": arguments.queries,
            "passes": arguments.passes,
            "negatives": arguments.negatives,
            "learning_rate": arguments.learning_rate,
            "batch": BATCH,
        },
        "overrides": arguments.set,
        "cost": cost,
        "collections": {
            collection.name: values(query_encoder, documents, collection, arguments.artifacts)
            for collection in collections
        },
        "versions": producers(),
    }


def minutes_to_train(stage: TrainingStage) -> float:
    """Train a stage and return the processor time of it.

    A training found by its fingerprint, because another method came to the same one, says nothing of its cost: 0.
    """
    began, used = time.time(), time.process_time()
    finished = (stage.folder / MANIFEST).stat().st_mtime
    return (time.process_time() - used) / 60 if finished >= began else 0.0


def needs_model(recipe: Recipe) -> bool:
    """Return whether the recipe's teacher is the usual ensemble, which takes a cross-encoder's name."""
    return not recipe.teacher.members and recipe.needs == "scores"


def budget(recipe: Recipe, arguments: argparse.Namespace) -> list[str]:
    """Return the overrides that give a recipe the common lists and its share of the common number of texts."""
    candidates = {
        "sources": "[dense]",
        "strategy": "top",
        "queries": arguments.queries,
        "window": "[1, 30]",
        "depth": 100,
    }
    schedule = {
        "batch_queries": BATCH,
        "micro_tokens": 512,
        "learning_rate": arguments.learning_rate,
        "evaluations": 2,
        "checkpoints": 1,
    }
    overrides = [f"candidates.{key}={value}" for key, value in candidates.items()]
    overrides += [f"schedule.{key}={value}" for key, value in schedule.items()]
    overrides.append(f"candidates.negatives={min(recipe.candidates.negatives, arguments.negatives)}")
    if recipe.teacher.compress is not None:
        negatives = min(recipe.teacher.compress.negatives, arguments.negatives)
        overrides += [f"teacher.compress.queries={arguments.queries}", f"teacher.compress.negatives={negatives}"]
    share = arguments.passes / len(recipe.training)
    for i, stage in enumerate(recipe.training):
        of = f"stages.{i}." if recipe.stages else ""
        queries = round(share * BATCH / (BATCH + stage.extra_texts.batch))
        epochs = max(1, math.ceil(queries / arguments.queries))
        overrides += [f"{of}schedule.epochs={epochs}", f"{of}schedule.epoch_queries={queries // epochs}"]
        if recipe.stages:
            negatives = min(stage.candidates.negatives, arguments.negatives)
            overrides.append(
                f"{of}candidates={{sources: [dense], strategy: top, queries: {arguments.queries}, "
                f"negatives: {negatives}}}"
            )
            overrides.append(f"{of}schedule.learning_rate={arguments.learning_rate}")
    return overrides


def texts_seen(stages: Sequence[TrainingStage]) -> dict[str, int]:
    """Return how many texts the student was trained on, repeats counted, by its own log."""
    seen = {"queries": 0, "extra_texts": 0}
    for stage in stages:
        rows = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
        steps = sum(row["event"] == "train" for row in rows)
        schedule = stage.spec.schedule
        of_epoch = min(len(stage.lists), schedule.epoch_queries or len(stage.lists))
        seen["queries"] += schedule.epochs * of_epoch
        seen["extra_texts"] += steps * stage.spec.extra_texts.batch
    return seen


def document_encoder(workspace: Workspace, query_encoder: Encoder) -> Encoder:
    """Return what encodes the documents: the large encoder, or the student itself where it is symmetric."""
    if query_encoder.card.space_fingerprint == workspace.encoder.card.space_fingerprint:
        return workspace.encoder
    if isinstance(query_encoder, TorchEncoder):
        return OnnxEncoder.load(workspace.export(query_encoder))
    return query_encoder


def values(queries: Encoder, documents: Encoder, collection: Collection, artifacts: Path) -> Result:
    """Measure a pair of encoders on a collection's test split, query by query."""
    corpus = encoded(documents, collection, artifacts)
    texts, qrels = split_queries(collection, SPLIT), collection.qrels(SPLIT)
    run = DenseSystem("student", queries, corpus).run(texts, 10)
    found = evaluate(run, qrels, [MEASURE])
    return {
        "split": SPLIT,
        "measure": MEASURE,
        "query_ids": fingerprint(list(found.query_ids)),
        "values": np.round(found.values[MEASURE], 6).tolist(),
    }


def read_results() -> dict[str, dict[str, Result]]:
    """Return label to name to result."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return found


def page(results: Mapping[str, Mapping[str, Result]]) -> str:
    """Return docs/methods.md."""
    return "\n".join([*_opening(), *_tables(results), *_goals(results), *_recipes(), ""])


def _opening() -> Iterator[str]:
    yield "# Methods"
    yield ""
    yield "Every method is a recipe: `rkd recipes` lists them, `rkd recipes show NAME` explains one and `rkd run NAME`"
    yield "runs it. This page is made by `python benchmarks/methods.py table` from the recipes and from the results of"
    yield "every query in `benchmarks/results/methods/`; do not edit it by hand."


def _tables(results: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    untrained = [one for of_label in results.values() for one in of_label.values() if not one["trained_on"]]
    for label, measured_here in results.items():
        modes = {one["mode"] for one in measured_here.values() if one["trained_on"]}
        students = {_student(one) for one in measured_here.values()}
        baselines = {
            one["name"]: one
            for one in untrained
            if one["name"] == TEACHER or (one["mode"] in modes and _student(one) in students)
        }
        of_label = {**baselines, **measured_here}
        yield from ("", f"## {_title(label)}", "")
        yield from _setting(of_label)
        yield ""
        yield from _rows(of_label)


def _student(one: Result) -> tuple[str, ...]:
    """Return the overrides that make the student, or what it learns, another one."""
    return tuple(override for override in one["overrides"] if override.startswith(("student", "encoder")))


def _title(label: str) -> str:
    titles = {
        "asymmetric": "Asymmetric: a 3-layer query tower before the large encoder's documents",
        "symmetric": "Symmetric: one 3-layer encoder for both sides",
        "best": "The default recipe at its own budget, with texts of two other collections",
        "shipped": "The default recipe as it ships",
        "best-symmetric": "The default recipe at its own budget, symmetric in two stages",
        "best-symmetric-one-stage": "The default recipe at its own budget, symmetric in one stage",
        "static": "Asymmetric: a static query encoder, one vector a token, before the large encoder's documents",
    }
    return titles.get(label, label)


def _setting(of_label: Mapping[str, Result]) -> Iterator[str]:
    trained = [one for one in of_label.values() if one["trained_on"]]
    if not trained:
        return
    first = max(trained, key=lambda one: len(one["collections"]))
    collections = " and ".join(f"{name} ({len(one['values']):,})" for name, one in first["collections"].items())
    setup = first["budget"]
    if first["overrides"]:
        yield f"With {_overrides(first)}."
    if setup:
        yield (
            f"Budget: {setup['passes']:,} query texts for each method, repeats and extra texts counted, from "
            f"{setup['queries']:,} train queries of {first['trained_on']} with the same lists (the positive and the "
            f"best {setup['negatives']} others by all-MiniLM-L6-v2, fewer where a method takes fewer), batches of "
            f"{setup['batch']}, peak learning rate {setup['learning_rate']:g}; nothing is tuned for one method. "
            f"Where a recipe names no other teacher, its scores are the mean of the cross-encoder's and {TEACHER}'s, "
            "both z-scored within each list."
        )
    seen = (
        "; the first is the collection trained on, the others were never seen" if len(first["collections"]) > 1 else ""
    )
    yield (
        f"{MEASURE} on the {SPLIT} split of {collections} queries{seen}. In brackets the share of {TEACHER}'s value "
        f"and the 95 % bootstrap interval of the difference from it."
    )
    for one in trained:
        if one["overrides"] != first["overrides"]:
            yield f"{one['name']}: with {_overrides(one)}."
    if BASELINE in of_label:
        yield (
            "CPU minutes are those of training the student: scores of the first stage's lists, and what makes a "
            "teacher (the smaller cross-encoder, a fine-tuned pairwise one), come before; scores that later stages "
            "need and a teacher that learns along are among them. Where none are given, another method's training was "
            "the same one."
        )
        yield (
            f"Bold: differs from {BASELINE} there (paired randomisation test, Holm-corrected over the methods, "
            f"p < {LARGEST_P:g})."
        )
        absent = sorted(set(shipped_recipes()) - set(of_label) - {"demo"})
        if absent:
            yield f"Without a result under this budget: {', '.join(absent)}."


def _overrides(one: Result) -> str:
    """Return the options as a shell takes them; folders of the machine that measured mean nothing to a reader."""
    mode = ["student.mode=symmetric"] if one["mode"] == "symmetric" else []
    shown = [re.sub(r"[^\s=\[]*/(?=[\w-])", "DIR/", override) for override in [*mode, *one["overrides"]]]
    return ", ".join(f"`--set {shlex.quote(override)}`" for override in shown)


def _rows(of_label: Mapping[str, Result]) -> Iterator[str]:
    names = list(dict.fromkeys(name for one in of_label.values() if one["trained_on"] for name in one["collections"]))
    tests = {name: _compared(of_label, name) for name in names}
    yield f"| method | needs | texts | CPU minutes | {' | '.join(names)} |"
    yield f"|---|---|---:|---:|{'---|' * len(names)}"
    ordered = sorted(of_label, key=lambda method: -np.mean(of_label[method]["collections"][names[0]]["values"]))
    for method in ordered:
        one = of_label[method]
        cost = one["cost"]
        texts = f"{cost['queries'] + cost['extra_texts']:,}" if cost else ""
        minutes = f"{cost['cpu_minutes']:.1f}" if "cpu_minutes" in cost else ""
        cells = " | ".join(_cell(of_label, method, name, tests[name]) for name in names)
        yield f"| {method} | {NEEDS[one['needs']]} | {texts} | {minutes} | {cells} |"


def _cell(of_label: Mapping[str, Result], method: str, collection: str, tests: Mapping[str, Comparison]) -> str:
    if collection not in of_label[method]["collections"]:
        return ""
    found = np.array(of_label[method]["collections"][collection]["values"])
    shown = f"{found.mean():.3f}"
    if method in tests and tests[method].p_holm < LARGEST_P:
        shown = f"**{shown}**"
    if method == TEACHER or TEACHER not in of_label:
        return shown
    whole = np.array(of_label[TEACHER]["collections"][collection]["values"])
    low, high = bootstrap_interval(found - whole, seed=0)
    return f"{shown} ({found.mean() / whole.mean():.1%}; {low:+.3f} to {high:+.3f})"


def _compared(of_label: Mapping[str, Result], collection: str) -> dict[str, Comparison]:
    """Compare every trained method with the baseline on one collection."""
    evaluations = {}
    for method, one in of_label.items():
        if one["trained_on"] and collection in one["collections"]:
            stored = one["collections"][collection]
            ids = tuple(f"{stored['query_ids']}/{i}" for i in range(len(stored["values"])))
            evaluations[method] = Evaluation(ids, {MEASURE: np.array(stored["values"])}, ())
    if BASELINE not in evaluations or len(evaluations) < 2:
        return {}
    return {one.system: one for one in compare(evaluations, BASELINE, MEASURE)}


def _goals(results: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    yield from ("", "## Against the goals", "")
    yield f"| student | collection | goal, share of {TEACHER} | kept |"
    yield "|---|---|---:|---:|"
    whole = {
        name: np.mean(one["values"])
        for of_label in results.values()
        if TEACHER in of_label
        for name, one in of_label[TEACHER]["collections"].items()
    }
    for label, of_collection in GOALS.items():
        for name, goal in of_collection.items():
            for one in results[label].values():
                if one["trained_on"]:
                    kept = np.mean(one["collections"][name]["values"]) / whole[name]
                    yield f"| {_title(label)} | {name} | {goal:.1%} | {kept:.2%}{'' if kept >= goal else ', missed'} |"
    yield from ("", *LIMITS.split("\n"))


def _recipes() -> Iterator[str]:
    yield from ("", "## Where each method comes from", "")
    yield "| recipe | source | follows | published | needs | loss |"
    yield "|---|---|---|---|---|---|"
    for name in shipped_recipes():
        recipe = load_recipe(name)
        terms = [
            " + ".join(f"{loss.weight:g} {loss.name}{_options(loss.options)}" for loss in stage.losses)
            for stage in recipe.training
        ]
        losses = "; then ".join(terms)
        yield f"| {name} | {recipe.source} | {recipe.follows} | {recipe.published} | {NEEDS[recipe.needs]} | {losses} |"


def _options(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else ""


if __name__ == "__main__":
    main()
