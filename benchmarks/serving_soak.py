"""A hundred thousand calls, a fifth of them cancelled, a twentieth past their deadline: does the memory grow?

grpc.aio has leaked on cancelled calls (grpc#43360), so the server's resident memory is read between rounds and a
line is fitted to the second half of the readings, after caches have filled. Nine calls of ten bring a vector, so
that the transport is worn and not the encoder.

    python benchmarks/serving_soak.py --world /tmp/world --json results/serving_soak.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from serving import TOP_K, machine, serving
from serving_load import kind_of

from protos.dense.retrieval.v1 import retrieval_pb2 as pb
from protos.dense.retrieval.v1 import retrieval_pb2_grpc as rpc
from retrieval_kd.artifacts import producers, write_json
from serve.client import RetrievalClient

AT_ONCE = 32
ROUNDS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="what benchmarks/serving_world.py wrote")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the report goes")
    arguments = parser.parse_args()
    texts = (arguments.world / "queries.txt").read_text().splitlines()
    with serving(arguments.world, arguments.server_core) as (target, pid):
        with RetrievalClient(target, timeout=60) as client:
            dimension = client.index().dimension
        began = time.perf_counter()
        sizes, codes = asyncio.run(soak(target, pid, texts, dimension, arguments.calls))
        seconds = time.perf_counter() - began
    settled = np.array(sizes[len(sizes) // 2 :], dtype=np.float64)
    slope = float(np.polyfit(np.arange(len(settled)) * arguments.calls / ROUNDS, settled, 1)[0])
    report: dict[str, Any] = {
        "calls": arguments.calls,
        "codes": dict(codes),
        "seconds": seconds,
        "resident_mib": [round(size / 2**20, 2) for size in sizes],
        "bytes_per_call": slope,
        "machine": machine(),
        "versions": producers(),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if arguments.json is not None:
        write_json(arguments.json, report)


async def soak(target: str, pid: int, texts: list[str], dimension: int, calls: int) -> tuple[list[int], Counter[str]]:
    codes: Counter[str] = Counter()
    sizes = []
    rng = np.random.default_rng(7)
    vectors = [pb.Vector(f32_le=row.tobytes()) for row in rng.standard_normal((64, dimension)).astype("<f4")]
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.RetrievalServiceStub(channel)
        await channel.channel_ready()

        async def one(number: int) -> None:
            request = pb.SearchRequest(top_k=TOP_K)
            if number % 10 == 0:
                request.text = texts[number % len(texts)]
            else:
                request.vector.CopyFrom(vectors[number % len(vectors)])
            call = stub.Search(request, timeout=0.0005 if number % 20 == 7 else 30)
            if number % 5 == 3:
                await asyncio.sleep(0.001 * (number % 4))
                call.cancel()
            try:
                await call
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[kind_of(error)] += 1
            except asyncio.CancelledError:
                codes["CANCELLED"] += 1

        numbers = iter(range(calls))

        async def worker(until: int) -> None:
            for number in numbers:
                await one(number)
                if number >= until:
                    return

        for done in range(1, ROUNDS + 1):
            await asyncio.gather(*(worker(done * calls // ROUNDS - 1) for _ in range(AT_ONCE)))
            sizes.append(resident_bytes(pid))
    return sizes, codes


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
