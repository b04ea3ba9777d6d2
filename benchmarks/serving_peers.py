"""One search at a time over the network: retrieval-kd against what people put in front of faiss.

Every server runs alone on one pinned core, the client on another. retrieval-kd and a peer take turns in every
round, so that a busy machine slows both, and the ratio is the median over the rounds of the ratio within a round.
The peers get the same student (the same ONNX file, or the same weights under torch), the same documents, and a raw
faiss HNSW graph, which is no slower than retrieval-kd's own index. A peer whose environment is missing is reported
as not run. ``limit`` is what the same encoder and index take in process, in batches and with no server: nobody who
computes the same vectors is faster. Each peer has an environment of its own under ``--environments``:

    python -m venv ENVIRONMENTS/mosec && ENVIRONMENTS/mosec/bin/pip install mosec onnxruntime faiss-cpu tokenizers
    ... fastapi:  fastapi uvicorn faiss-cpu sentence-transformers
    ... pytriton: nvidia-pytriton onnxruntime faiss-cpu tokenizers (Python 3.11 before 3.11.5, which Debian 12 has)
    ... infinity: infinity-emb[server,torch] faiss-cpu

    python benchmarks/serving_peers.py --world /tmp/world --environments /tmp/peers --json results/serving_peers.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from serving import BATCH, CALLERS, TOP_K, in_process_on, machine, serving
from serving_load import Call, closed_loop, cpu_seconds

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.artifacts import producers, write_json

PEERS = Path(__file__).with_name("peers")
START_SECONDS = 180.0


@dataclass(frozen=True)
class Peer:
    """A server to compare with.

    Attributes:
        name: What the report calls it.
        environment: Its folder under ``--environments``.
        packages: Whose versions the report names.
        goal: How many times faster retrieval-kd wants to be.
        body: Makes a request's path and JSON body from a text.
    """

    name: str
    environment: str
    packages: tuple[str, ...]
    goal: float
    body: Callable[[str], tuple[str, dict[str, Any]]]


def plain(text: str) -> tuple[str, dict[str, Any]]:
    return "/search", {"text": text}


def inference(text: str) -> tuple[str, dict[str, Any]]:
    return "/inference", {"text": text}


def triton(text: str) -> tuple[str, dict[str, Any]]:
    tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
    return "/v2/models/search/infer", {"inputs": [tensor]}


ALL = (
    Peer("FastAPI + sentence-transformers + faiss", "fastapi", ("fastapi", "sentence-transformers"), 5.0, plain),
    Peer("infinity-emb + faiss", "infinity", ("infinity-emb",), 1.5, plain),
    Peer("nvidia-pytriton + faiss", "pytriton", ("nvidia-pytriton",), 1.5, triton),
    Peer("mosec + faiss", "mosec", ("mosec",), 1.5, inference),
)


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, {arguments.client_core})
    texts = (arguments.world / "queries.txt").read_text().splitlines()
    with serving(arguments.world, arguments.server_core) as (target, pid):
        rows = [compare(arguments, peer, target, pid, texts) for peer in ALL]
    limits = [in_process_on(arguments.server_core, arguments.world, arguments.seconds) for _ in range(arguments.rounds)]
    report = {
        "queries": len(texts),
        "documents": len((arguments.world / "ids.txt").read_text().splitlines()),
        "top_k": TOP_K,
        "callers": CALLERS,
        "rounds": arguments.rounds,
        "seconds_each": arguments.seconds,
        "machine": machine(),
        "versions": producers(),
        "limit": {
            "queries_a_call": BATCH,
            "cpu_ms_per_query": statistics.median(limit["batch"]["cpu_ms_per_query"] for limit in limits),
        },
        "peers": rows,
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if arguments.json is not None:
        write_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="what benchmarks/serving_world.py wrote")
    parser.add_argument("--environments", type=Path, required=True, help="where the peers' environments are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the report goes")
    return parser.parse_args()


def compare(arguments: argparse.Namespace, peer: Peer, target: str, pid: int, texts: Sequence[str]) -> dict[str, Any]:
    python = arguments.environments / peer.environment / "bin" / "python"
    row: dict[str, Any] = {"name": peer.name, "goal": peer.goal}
    if not python.exists():
        return {**row, "not_run": f"no environment {peer.environment}"}
    row["versions"] = versions(python, peer.packages)
    try:
        with running(peer, python, arguments) as (port, process):
            rounds = asyncio.run(take_turns(arguments, peer, target, pid, port, process.pid, texts))
    except RuntimeError as error:
        return {**row, "not_run": str(error)}
    return {**row, **summary(rounds)}


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    code = "import importlib.metadata as m, sys, json; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


@contextlib.contextmanager
def running(peer: Peer, python: Path, arguments: argparse.Namespace) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a peer's server on its core until the block ends.

    Raises:
        RuntimeError: it did not answer in time; the message has the last line it wrote.
    """
    port = free_port()
    script = PEERS / f"serve_{peer.environment}.py"
    command = ["taskset", "-c", str(arguments.server_core), str(python), str(script), str(arguments.world), str(port)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    environment.pop("PYTHONPATH", None)
    log = arguments.environments / f"{peer.environment}-server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        if not asyncio.run(answers(peer, port, process)):
            said = log.read_text(errors="replace").strip().splitlines() or ["no message"]
            why = [line for line in said if "Error: " in line] or said
            raise RuntimeError(f"the server did not answer: {why[-1].strip()[:200]}")
        yield port, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def answers(peer: Peer, port: int, process: subprocess.Popen[bytes]) -> bool:
    """Return whether a peer answered a query before it ended or took too long."""
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            async with http(peer, port, 1) as call:
                await call("what is a heap")
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.5)
        else:
            return True
    return False


@contextlib.asynccontextmanager
async def http(peer: Peer, port: int, connections: int) -> AsyncIterator[Call]:
    """Yield a call over kept-alive HTTP/1.1 connections, with as little client as there can be."""
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    for pair in opened:
        free.put_nowait(pair)

    async def call(text: str) -> None:
        path, body = peer.body(text)
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
        pair = await free.get()
        try:
            reader, writer = pair
            writer.write(head.encode() + b"\r\n\r\n" + payload)
            status = await reader.readline()
            length = 0
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            answer = await reader.readexactly(length)
            if b" 200 " not in status:
                raise RuntimeError(f"{status.decode().strip()}: {answer[:100]!r}")
        finally:
            free.put_nowait(pair)

    try:
        yield call
    finally:
        for _, writer in opened:
            writer.close()


async def take_turns(
    arguments: argparse.Namespace, peer: Peer, target: str, ours: int, port: int, theirs: int, texts: Sequence[str]
) -> list[dict[str, dict[str, float]]]:
    async with grpc.aio.insecure_channel(target) as channel, http(peer, port, CALLERS) as their_call:
        stub = rpc.RetrievalServiceStub(channel)

        async def our_call(text: str) -> None:
            await stub.Search(pb.SearchRequest(text=text, top_k=TOP_K), timeout=30)

        async def measured(call: Call, pid: int) -> dict[str, float]:
            cpu = cpu_seconds(pid)
            rate, outcome = await closed_loop(call, texts, CALLERS, arguments.seconds)
            if not outcome.seconds:
                raise RuntimeError(f"no call succeeded: {outcome.failures}")
            used = 1e3 * (cpu_seconds(pid) - cpu) / len(outcome.seconds)
            return {"queries_per_second": rate, "cpu_ms_per_query": used, **outcome.percentiles()}

        for call in (our_call, their_call):
            await closed_loop(call, texts, CALLERS, 1.0)
        return [
            {"ours": await measured(our_call, ours), "theirs": await measured(their_call, theirs)}
            for _ in range(arguments.rounds)
        ]


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    keys = rounds[0]["ours"]
    sides = {side: {key: statistics.median(one[side][key] for one in rounds) for key in keys} for side in rounds[0]}
    return {
        **sides,
        "ratio": statistics.median(
            one["ours"]["queries_per_second"] / one["theirs"]["queries_per_second"] for one in rounds
        ),
        "cpu_ratio": statistics.median(
            one["theirs"]["cpu_ms_per_query"] / one["ours"]["cpu_ms_per_query"] for one in rounds
        ),
    }


if __name__ == "__main__":
    main()
