"""One run scored by several toolkits: where they differ, and by how much.

Three forms of the same run: as written (strictly decreasing scores), with scores rounded so that many tie, and with
every tenth query left out. Each toolkit gets the run as its users give it.

    python benchmarks/toolkits.py REPORT --system bm25 --json toolkits.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.runs import rank, read_trec

Scored = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]
MEASURES = ("nDCG@10", "RR@10", "AP@100")


def main() -> None:
    arguments = parse_arguments()
    run = read_trec(arguments.report / "runs" / f"{arguments.system}.trec")
    qrels = read_qrels(arguments.report / "qrels.txt")
    plain = {query: dict(zip(found.doc_ids, map(float, found.scores), strict=True)) for query, found in run.items()}
    forms = {
        "as written": plain,
        "scores rounded, many ties": {q: {d: float(np.round(s)) for d, s in docs.items()} for q, docs in plain.items()},
        "every tenth query missing": {q: docs for number, (q, docs) in enumerate(plain.items()) if number % 10},
    }
    tools = {"retrieval-kd": ours, "pytrec_eval": trec, "ranx": ranx, "sentence-transformers": peer}
    rows = []
    for form, scored in forms.items():
        for name, score in tools.items():
            try:
                means = score(scored, qrels)
            except ModuleNotFoundError as error:
                means = dict.fromkeys(MEASURES)
                sys.stderr.write(f"{name}: {error}\n")
            rows.append({"run": form, "toolkit": name, **means})
    collection = json.loads((arguments.report / "report.json").read_text())
    report = {
        "collection": collection["collection"],
        "split": collection["split"],
        "queries": len(qrels),
        "system": arguments.system,
        "measures": list(MEASURES),
        "rows": rows,
    }
    for row in rows:
        values = "  ".join("-" if row[m] is None else f"{row[m]:.4f}" for m in MEASURES)
        sys.stdout.write(f"{row['run']:<28}{row['toolkit']:<24}{values}\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a report's folder")
    parser.add_argument("--system", required=True, help="a file of its runs folder, without ending")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, _, doc, grade = line.split()
        qrels.setdefault(query, {})[doc] = int(grade)
    return qrels


def ours(run: Scored, qrels: Qrels) -> dict[str, float]:
    from eval.measures import evaluate

    return evaluate({q: rank(list(docs), list(docs.values())) for q, docs in run.items()}, qrels, MEASURES).means


def trec(run: Scored, qrels: Qrels) -> dict[str, float]:
    """Score as trec_eval does by default: over the queries that the run answers."""
    import pytrec_eval

    names = {"nDCG@10": "ndcg_cut_10", "RR@10": "recip_rank", "AP@100": "map_cut_100"}
    scored = pytrec_eval.RelevanceEvaluator(qrels, set(names.values())).evaluate(run)
    # trec_eval has no cut-off for the reciprocal rank: the run is cut by its users, here to ten.
    short = {q: dict(sorted(docs.items(), key=lambda item: -item[1])[:10]) for q, docs in run.items()}
    cut = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(short)
    means = {measure: float(np.mean([values[name] for values in scored.values()])) for measure, name in names.items()}
    return {**means, "RR@10": float(np.mean([values["recip_rank"] for values in cut.values()]))}


def ranx(run: Scored, qrels: Qrels) -> dict[str, float]:
    from ranx import Qrels as RanxQrels
    from ranx import Run as RanxRun
    from ranx import evaluate

    judged = {q: {d: grade for d, grade in grades.items() if grade > 0} for q, grades in qrels.items()}
    found = evaluate(
        RanxQrels({q: grades for q, grades in judged.items() if grades}), RanxRun(dict(run)),
        ["ndcg@10", "mrr@10", "map@100"], make_comparable=True,
    )  # fmt: skip
    return dict(zip(MEASURES, (float(found[name]) for name in ("ndcg@10", "mrr@10", "map@100")), strict=True))


def peer(run: Scored, qrels: Qrels) -> dict[str, float]:
    """Score by the evaluator's own measures, from the hits its search would give."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    relevant = {query: {doc for doc, grade in grades.items() if grade > 0} for query, grades in qrels.items()}
    evaluator = InformationRetrievalEvaluator(
        dict.fromkeys(run, "."), {"d": "."}, relevant, mrr_at_k=[10], ndcg_at_k=[10], map_at_k=[100], write_csv=False
    )
    hits: Callable[[str], Any] = lambda query: [  # noqa: E731
        {"corpus_id": doc, "score": score}
        for doc, score in sorted(run[query].items(), key=lambda item: (-item[1], item[0]))
    ]
    scores = evaluator.compute_metrics([hits(query) for query in evaluator.queries_ids])
    return {"nDCG@10": scores["ndcg@k"][10], "RR@10": scores["mrr@k"][10], "AP@100": scores["map@k"][100]}


if __name__ == "__main__":
    main()
