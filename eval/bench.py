"""What a system costs: latency by stage, throughput, processor time, memory; one system in one process.

Every system is measured in a process of its own, pinned to cores and warmed up, so that memory and
processor time are its alone. Quality comes from the same run, so a Pareto front compares like with like.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.fusion import FusedSystem
from eval.latency import Latency
from eval.measures import evaluate, require_measurable
from eval.open_loop import OpenLoop, open_loop
from eval.opening import Component, Opener
from eval.report import write_report
from eval.results import Facts, SystemResult
from eval.shape import Shape
from eval.specs import SystemSpec, in_order, needed, require_rerank_depth
from eval.systems import BM25System, RunSystem, ScoredRerank, ServerSystem, System
from retrieval_kd.artifacts import read_json, write_json
from retrieval_kd.collections.base import Collection, split_queries
from retrieval_kd.collections.open import open_collection
from retrieval_kd.errors import DataError
from retrieval_kd.progress import silence
from retrieval_kd.recipes.schema import CollectionSpec
from retrieval_kd.runs import Run, read_trec, write_trec

_COST, _RUN = "cost.json", "run.trec"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """How a bench is run.

    Attributes:
        calls: Queries timed one by one.
        warmup: Queries run before the clock counts.
        depth: Documents retrieved for each query.
        cores: Cores the system may use; all that this process has when empty.
        rate: Requests each second in the open loop, for servers; none when 0.
        seconds: How long the open loop runs.
        server_pid: The server's process, whose processor time and memory are summed with those of its workers;
            unknown when 0.
        seed: Seed of the sample and of the arrivals.
        remove_self: Drop the document with the query's id; None does so for ArguAna and Quora.
    """

    calls: int = 200
    warmup: int = 20
    depth: int = 10
    cores: tuple[int, ...] = ()
    rate: float = 0.0
    seconds: float = 10.0
    server_pid: int = 0
    seed: int = 0
    remove_self: bool | None = None


@dataclass(frozen=True)
class Cost:
    """What was measured of one system.

    Attributes:
        stages: Stage to the percentiles of single calls; ``total`` is text to ranking.
        queries_per_s: The whole split given at once.
        cpu_s_per_1000: Processor seconds for a thousand of those queries, over all threads; None for a
            server whose process is not known.
        memory_bytes: Resident size when warm; of the server's process and its workers for a server, pages that
            they share counted for each.
        peak_bytes: Largest resident size, loading and building included; of several processes the sum of each.
        build_s: Seconds to build what is searched, from texts (BM25) or vectors (an encoder's flat index).
        documents_per_s: Documents encoded each second, measured on a sample.
        open_loop: Behaviour under offered load.
        cores: Cores the process was pinned to.
    """

    stages: Mapping[str, Latency]
    queries_per_s: float
    cpu_s_per_1000: float | None
    memory_bytes: int | None
    peak_bytes: int | None
    build_s: float | None = None
    documents_per_s: float | None = None
    open_loop: OpenLoop | None = None
    cores: tuple[int, ...] = ()


def bench(
    collection: str,
    split: str,
    specs: Sequence[SystemSpec],
    load: Load,
    measures: Sequence[str],
    cache: Path,
    out: Path,
    command: str,
    distractors: Sequence[str] = (),
    announce: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Bench every system in a process of its own and write a report with cost beside quality.

    Raises:
        RkdError: a core that this process may not run on, or whatever is wrong with the collection or a system; a
            process that failed says why.
    """
    require_measurable(measures, load.depth)
    ordered = in_order(specs)
    if not ordered:
        raise DataError("no system to bench; name --system (see --help)")
    usable = os.sched_getaffinity(0)
    if absent := sorted(set(load.cores) - usable):
        raise DataError(f"--core {absent[0]}: this process may run on {', '.join(map(str, sorted(usable)))}")
    opened = open_collection(CollectionSpec(collection, tuple(distractors)))
    qrels, shape = opened.qrels(split), Shape.of(opened, load.remove_self)
    results = []
    for spec in ordered:
        announce(f"{opened.name}: bench {spec}")
        with tempfile.TemporaryDirectory() as scratch:
            _in_own_process(collection, split, ordered, spec, load, cache, Path(scratch), distractors)
            entry = read_json(Path(scratch) / _COST)
            run = shape(read_trec(Path(scratch) / _RUN), load.depth)
        judged = evaluate(run, qrels, ["Judged@10"]).means["Judged@10"]
        evaluation = evaluate(run, qrels, measures)
        result = SystemResult.of(
            entry["name"], entry["role"], evaluation, Facts(**entry["facts"]), run, load.seed, judged
        )
        results.append(replace(result, cost=entry["cost"]))
    return write_report(
        out,
        collection=opened.name,
        split=split,
        systems=results,
        documents=sum(1 for _ in opened.documents()),
        baseline=results[0].name if len(results) > 1 else None,
        provenance={
            "command": command,
            "collection": opened.fingerprint,
            "systems": {result.name: str(spec) for result, spec in zip(results, ordered, strict=True)},
            "bench": asdict(load),
        },
        notes=shape.notes,
        seed=load.seed,
    )


def bench_one(
    collection: str,
    split: str,
    specs: Sequence[SystemSpec],
    reference: str,
    load: Load,
    cache: Path,
    into: Path,
    distractors: Sequence[str] = (),
) -> None:
    """Bench one system in this process, which should do nothing else, and leave cost and run in ``into``."""
    cores = load.cores or tuple(sorted(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, cores)
    opened = open_collection(CollectionSpec(collection, tuple(distractors)))
    queries, qrels = split_queries(opened, split), opened.qrels(split)
    shape = Shape.of(opened, load.remove_self)
    depth = shape.search_depth(load.depth)
    with contextlib.ExitStack() as stack:
        opener = Opener(cache, stack)
        components: dict[str, Component] = {}
        *before, spec = needed(specs, reference)
        for component in before:
            require_rerank_depth(component, depth)
            first = opener.open(component, opened, opened, qrels, components)
            run = first.run(queries, depth)
            components[component.reference] = Component(first.name, run, shape(run, load.depth))
        require_rerank_depth(spec, depth)
        system = opener.open(spec, opened, opened, qrels, components)
        cost, run, facts = _cost_and_quality(system, queries, opened, replace(load, cores=cores, depth=depth))
    write_trec(into / _RUN, {query_id: ranking for query_id, ranking in run.items() if len(ranking)}, "bench")
    written = None if cost is None else asdict(cost)
    write_json(into / _COST, {"name": system.name, "role": system.role, "facts": asdict(facts), "cost": written})


def _cost_and_quality(
    system: System, queries: Mapping[str, str], collection: Collection, load: Load
) -> tuple[Cost | None, Run, Facts]:
    """Measure what answers queries itself; to look a ranking up that was stored costs nothing that says anything."""
    if isinstance(system, RunSystem | FusedSystem):
        return None, system.run(queries, load.depth), Facts()
    if not isinstance(system, ScoredRerank):
        return measure_cost(system, queries, collection, load)
    run = system.run(queries, load.depth)
    if system.timed is None:
        return None, run, Facts()
    # It scores pairs by the hundred for each query, so that the sample is all that is affordable.
    cost, _, facts = measure_cost(system.timed, _sample(queries, load), collection, load)
    return cost, run, facts


def measure_cost(
    system: System, queries: Mapping[str, str], collection: Collection, load: Load
) -> tuple[Cost, Run, Facts]:
    """Measure an opened system in this process.

    Returns:
        The cost, the run over all queries, and the facts of the report's table.
    """
    build_s = _build_seconds(system)
    sample = _sample(queries, load)
    with silence():
        warm = dict(list(sample.items())[: load.warmup])
        for query_id, text in warm.items():
            system.run({query_id: text}, load.depth)
        facts = system.facts(sample, load.depth)
        stages = _stages(system, sample, load.depth)
        pid = load.server_pid if isinstance(system, ServerSystem) else os.getpid()
        before, start = _cpu_seconds(pid), time.perf_counter()
        run = system.run(queries, load.depth)
        wall, after = time.perf_counter() - start, _cpu_seconds(pid)
        loop = None
        if isinstance(system, ServerSystem) and load.rate > 0:
            client = system.client
            loop = open_loop(
                lambda text: client.search(text, top_k=load.depth),
                list(sample.values()), load.rate, load.seconds, load.seed,
            )  # fmt: skip
        documents_per_s = _encoding_speed(system, collection)
    total = stages["total"]
    cost = Cost(
        stages=stages,
        queries_per_s=len(queries) / wall,
        cpu_s_per_1000=None if before is None or after is None else 1000 * (after - before) / len(queries),
        memory_bytes=_status_bytes(pid, "VmRSS"),
        peak_bytes=_status_bytes(pid, "VmHWM"),
        build_s=build_s,
        documents_per_s=documents_per_s,
        open_loop=loop,
        cores=load.cores,
    )
    encode = stages.get("encode")
    facts = replace(
        facts,
        encode_ms_p50=encode.p50_ms if encode and facts.encode_ms_p50 else facts.encode_ms_p50,
        query_ms_p50=total.p50_ms,
        query_ms_p95=total.p95_ms,
    )
    return cost, run, facts


def _stages(system: System, sample: Mapping[str, str], depth: int) -> dict[str, Latency]:
    """Time single queries: each stage where the system has them, and the whole."""
    staged = getattr(system, "staged", None)
    seconds: dict[str, list[float]] = {}
    for query_id, text in sample.items():
        start = time.perf_counter()
        if staged is None:
            system.run({query_id: text}, depth)
            parts: Mapping[str, float] = {}
        else:
            parts = staged(text, depth)
        seconds.setdefault("total", []).append(time.perf_counter() - start)
        for stage, took in parts.items():
            seconds.setdefault(stage, []).append(took)
    return {stage: Latency.of(values) for stage, values in seconds.items()}


def _build_seconds(system: System) -> float | None:
    from eval.dense import DenseSystem

    start = time.perf_counter()
    if isinstance(system, BM25System):
        system.prepare()
    elif isinstance(system, DenseSystem):
        from index.build import build_index
        from retrieval_kd.recipes.schema import IndexSpec

        with tempfile.TemporaryDirectory() as scratch, silence():
            build_index(system.corpus, IndexSpec(), Path(scratch) / "store")
            return time.perf_counter() - start
    else:
        return None
    return time.perf_counter() - start


def _encoding_speed(system: System, collection: Collection, documents: int = 64) -> float | None:
    from eval.dense import DenseSystem

    if not isinstance(system, DenseSystem) or system.document_encoder is None:
        return None
    step = max(1, len(system.corpus.ids) // documents)
    texts = list(collection.contents(system.corpus.ids[::step][:documents]).values())
    start = time.perf_counter()
    system.document_encoder.encode(texts, "document")
    return len(texts) / (time.perf_counter() - start)


def _sample(queries: Mapping[str, str], load: Load) -> dict[str, str]:
    ids = list(queries)
    rng = np.random.default_rng([load.seed, 2])
    chosen = rng.choice(len(ids), size=min(load.calls, len(ids)), replace=False)
    return {ids[i]: queries[ids[i]] for i in chosen.tolist()}


def _in_own_process(
    collection: str,
    split: str,
    specs: Sequence[SystemSpec],
    spec: SystemSpec,
    load: Load,
    cache: Path,
    into: Path,
    distractors: Sequence[str],
) -> None:
    request = {
        "collection": collection,
        "split": split,
        "specs": [str(other) for other in specs],
        "reference": spec.reference,
        "load": asdict(load),
        "cache": str(cache),
        "into": str(into),
        "distractors": list(distractors),
    }
    threads = str(len(load.cores or os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-m", "eval.bench_process"],
        input=json.dumps(request), text=True, stderr=subprocess.PIPE, env=environment, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"no message, exit status {done.returncode}"]
        raise DataError(f"bench of {spec}: {said[-1].removeprefix('error: ')}")


def _family(pid: int) -> list[int]:
    """Return a process and all that descend from it: the one that starts a server's workers encodes nothing itself."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat_fields(int(folder.name))[1]), []).append(int(folder.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` after the command's name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def _cpu_seconds(pid: int) -> float | None:
    if pid == os.getpid():
        return time.process_time()
    ticks = []
    for member in _family(pid):
        with contextlib.suppress(OSError):
            fields = _stat_fields(member)
            ticks.append(int(fields[11]) + int(fields[12]))
    return sum(ticks) / _TICKS if ticks else None


def _status_bytes(pid: int, key: str) -> int | None:
    found = []
    for member in [pid] if pid == os.getpid() else _family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{member}/status").read_text(encoding="utf-8").splitlines()
            found += [1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    return sum(found) if found else None
