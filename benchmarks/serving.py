"""The server against the same encoder and index called in process, and how it feels at a quarter to all of its load.

Server and in-process ceiling run on one pinned core, the client on another, in turns, so that a busy machine slows
all of them alike; a share is the median over the rounds of the share within a round. ``cpu_share`` compares
CPU seconds a query and is the one to trust on a machine that others use.

    python benchmarks/serving_world.py --union /tmp/union --collection data/msmarco --out /tmp/world
    python benchmarks/serving.py --world /tmp/world --json results/serving.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from serving_load import Outcome, closed_loop, cpu_seconds, open_loop

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.artifacts import producers, write_json

TOP_K = 10
BATCH = 64
CALLERS = 16
BATCH_CALLERS = 3
SHARES = (0.25, 0.5, 0.75, 1.0)
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = parse_arguments()
    if arguments.in_process:
        sys.stdout.write(json.dumps(in_process(arguments.world, arguments.seconds)))
        return
    os.sched_setaffinity(0, {arguments.client_core})
    texts = (arguments.world / "queries.txt").read_text().splitlines()
    with serving(arguments.world, arguments.server_core) as (target, pid):
        rounds = [one_round(arguments, target, pid, texts) for _ in range(arguments.rounds)]
        saturation = statistics.median(one["server"]["unary"]["queries_per_second"] for one in rounds)
        loops = [open_at(target, texts, share, saturation, arguments.seconds) for share in SHARES]
    report = {
        "queries": len(texts),
        "top_k": TOP_K,
        "rounds": arguments.rounds,
        "seconds_each": arguments.seconds,
        "machine": machine(),
        "versions": producers(),
        "unary": compared(rounds, "unary"),
        "batch": {"queries_a_call": BATCH, **compared(rounds, "batch")},
        "saturation_queries_per_second": saturation,
        "open_loop": loops,
        "load_average_after": os.getloadavg()[0],
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if arguments.json is not None:
        write_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="what benchmarks/serving_world.py wrote")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--in-process", action="store_true", help="be the ceiling, on the core this process runs on")
    parser.add_argument("--json", type=Path, help="where the report goes")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def in_process(world: Path, seconds: float) -> dict[str, Any]:
    """Return what a loop without any server does on this core."""
    from index.search import Searcher
    from retrieval_kd.encoders.onnx import OnnxEncoder

    encoder, searcher = OnnxEncoder.load(world / "encoder", 1), Searcher.open(world / "store")
    texts = (world / "queries.txt").read_text().splitlines()

    def rate(size: int) -> dict[str, float]:
        queue = itertools.cycle(texts)
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < began + seconds:
            rows = encoder.tokenize([next(queue) for _ in range(size)], "query")
            searcher.search(encoder.run(rows), TOP_K)
            done += size
        return {
            "queries_per_second": done / (time.perf_counter() - began),
            "cpu_ms_per_query": 1e3 * (time.process_time() - cpu) / done,
        }

    rate_of_warm_up = rate(1)
    assert rate_of_warm_up["queries_per_second"] > 0
    return {"unary": rate(1), "batch": rate(BATCH)}


@contextlib.contextmanager
def serving(world: Path, core: int) -> Iterator[tuple[str, int]]:
    """Run ``rkd serve`` on one core; yield its address and process."""
    verb = [sys.executable, "-m", "retrieval_kd.cli.main", "serve", str(world / "store")]
    options = ["--encoder", str(world / "encoder"), "--port", "0", "--threads", "1", "--json"]
    command = ["taskset", "-c", str(core), *verb, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            yield f"127.0.0.1:{json.loads(line)['port']}", server.pid
        finally:
            server.terminate()


def one_round(arguments: argparse.Namespace, target: str, pid: int, texts: Sequence[str]) -> dict[str, Any]:
    ceiling = in_process_on(arguments.server_core, arguments.world, arguments.seconds)
    return {"ceiling": ceiling, "server": asyncio.run(closed(target, pid, texts, arguments.seconds))}


def in_process_on(core: int, world: Path, seconds: float) -> dict[str, Any]:
    """Return :func:`in_process` of a process of its own, which runs on one core."""
    verb = [sys.executable, __file__, "--world", str(world), "--seconds", str(seconds)]
    command = ["taskset", "-c", str(core), *verb, "--in-process"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


async def closed(target: str, pid: int, texts: Sequence[str], seconds: float) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.RetrievalServiceStub(channel)

        async def unary(text: str) -> None:
            await stub.Search(pb.SearchRequest(text=text, top_k=TOP_K), timeout=30)

        batches = itertools.cycle(cut(texts))

        async def batch(_: str) -> None:
            queries = [pb.Query(text=text) for text in next(batches)]
            await stub.BatchSearch(pb.BatchSearchRequest(queries=queries, top_k=TOP_K), timeout=30)

        await closed_loop(unary, texts, CALLERS, 1.0)
        measured = {}
        for name, call, callers, size in (("unary", unary, CALLERS, 1), ("batch", batch, BATCH_CALLERS, BATCH)):
            cpu = cpu_seconds(pid)
            rate, outcome = await closed_loop(call, texts, callers, seconds)
            used = cpu_seconds(pid) - cpu
            measured[name] = {
                "queries_per_second": size * rate,
                "cpu_ms_per_query": 1e3 * used / (size * len(outcome.seconds)),
                "failures": outcome.failures,
                **outcome.percentiles(),
            }
        return measured


def cut(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + BATCH] for start in range(0, len(texts) - BATCH + 1, BATCH)]


def open_at(target: str, texts: Sequence[str], share: float, saturation: float, seconds: float) -> dict[str, Any]:
    async def run() -> Outcome:
        async with grpc.aio.insecure_channel(target) as channel:
            stub = rpc.RetrievalServiceStub(channel)
            await channel.channel_ready()

            async def unary(text: str) -> None:
                await stub.Search(pb.SearchRequest(text=text, top_k=TOP_K), timeout=5)

            return await open_loop(unary, texts, share * saturation, seconds)

    outcome = asyncio.run(run())
    figures = outcome.percentiles()
    sent = len(outcome.seconds) + sum(outcome.failures.values())
    return {
        "share_of_saturation": share,
        "offered_per_second": share * saturation,
        "calls": sent,
        "errors": outcome.failures,
        **figures,
        "p99_over_median": figures["p99_ms"] / figures["p50_ms"],
    }


def compared(rounds: list[dict[str, Any]], kind: str) -> dict[str, float]:
    def median(side: str, key: str) -> float:
        return statistics.median(one[side][kind][key] for one in rounds)

    rates = [(one["server"][kind], one["ceiling"][kind]) for one in rounds]
    return {
        "server_queries_per_second": median("server", "queries_per_second"),
        "ceiling_queries_per_second": median("ceiling", "queries_per_second"),
        "server_cpu_ms_per_query": median("server", "cpu_ms_per_query"),
        "ceiling_cpu_ms_per_query": median("ceiling", "cpu_ms_per_query"),
        "share": statistics.median(s["queries_per_second"] / c["queries_per_second"] for s, c in rates),
        "cpu_share": statistics.median(c["cpu_ms_per_query"] / s["cpu_ms_per_query"] for s, c in rates),
    }


if __name__ == "__main__":
    main()
