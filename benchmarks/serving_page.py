"""Write the measured part of ``docs/serving.md`` from the reports of the serving benchmarks.

python benchmarks/serving_page.py --results benchmarks/results --page docs/serving.md
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from retrieval_kd.artifacts import atomic_write, read_json

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of serving.json and its siblings")
    parser.add_argument("--page", type=Path, required=True, help="the page, with the two marks in it")
    arguments = parser.parse_args()
    parts = [
        made(read_json(arguments.results / name))
        for name, made in (
            ("serving.json", against_ceiling),
            ("serving_peers.json", peers),
            ("serving_soak.json", soak),
        )
        if (arguments.results / name).is_file()
    ]
    page = arguments.page.read_text(encoding="utf-8")
    measured = "\n\n".join([BEGIN, *parts, END])
    with atomic_write(arguments.page) as file:
        file.write(re.sub(f"{BEGIN}.*{END}", lambda _: measured, page, flags=re.DOTALL))


def against_ceiling(report: dict[str, Any]) -> str:
    unary, batch = report["unary"], report["batch"]
    rows = [
        (name, f"{one['server_cpu_ms_per_query']:.2f}", f"{one['ceiling_cpu_ms_per_query']:.2f}",
         f"{one['cpu_share']:.0%}", f"{one['share']:.0%}", goal)
        for name, one, goal in (("Search", unary, "80 %"), (f"BatchSearch of {batch['queries_a_call']}", batch, "95 %"))
    ]  # fmt: skip
    loops = [
        (f"{one['share_of_saturation']:.0%}", f"{one['offered_per_second']:.0f}", one["calls"],
         f"{one['p50_ms']:.1f}", f"{one['p95_ms']:.1f}", f"{one['p99_ms']:.1f}", f"{one['p99_over_median']:.1f}",
         sum(one["errors"].values()))
        for one in report["open_loop"]
    ]  # fmt: skip
    return "\n\n".join(
        [
            "### Against the same encoder and index in process",
            (
                f"{report['queries']} queries, the best {report['top_k']}; medians of {report['rounds']} rounds of "
                f"{report['seconds_each']:g} s, server and ceiling in turns on one core, the client on the other; "
                f"{where(report)} Command: `python benchmarks/serving.py --world WORLD`."
            ),
            table(
                ("call", "server, CPU ms a query", "in process", "share of CPU", "share of throughput", "goal"), rows
            ),
            f"Open loop, unary Search; saturation is {report['saturation_queries_per_second']:.0f} queries a second:",
            table(("load", "offered / s", "calls", "p50 ms", "p95 ms", "p99 ms", "p99 / p50", "errors"), loops),
        ]
    )


def peers(report: dict[str, Any]) -> str:
    rows = []
    least = report["limit"]["cpu_ms_per_query"]
    for peer in report["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in peer.get("versions", {}).items())
        if "not_run" in peer:
            rows.append((peer["name"], versions, "not run", "", "", "", "", f"{peer['goal']:g}x"))
            continue
        rows.append(
            (peer["name"], versions, f"{peer['ours']['cpu_ms_per_query']:.2f}",
             f"{peer['theirs']['cpu_ms_per_query']:.2f}", f"{peer['cpu_ratio']:.2f}x", f"{peer['ratio']:.2f}x",
             f"{peer['theirs']['cpu_ms_per_query'] / least:.1f}x", f"{peer['goal']:g}x")
        )  # fmt: skip
    reasons = [f"Not run, {peer['name']}: {peer['not_run']}." for peer in report["peers"] if "not_run" in peer]
    return "\n\n".join(
        [
            "### Against what people put in front of faiss",
            (
                f"{report['documents']} documents, {report['callers']} callers of single searches, {report['rounds']} "
                f"rounds of {report['seconds_each']:g} s in turns, one core each; above 1 favours retrieval-kd; "
                f"{where(report)} Command: `python benchmarks/serving_peers.py --world WORLD --environments "
                "ENVIRONMENTS`. text-embeddings-inference was not run: it cannot be installed with pip."
            ),
            table(
                ("peer", "versions", "ours, CPU ms", "theirs", "CPU ratio", "throughput ratio", "limit", "goal"), rows
            ),
            (
                f"Limit: the same encoder and index in process, {report['limit']['queries_a_call']} queries at a time "
                f"without any server, take {least:.2f} CPU ms a query; no server of the same ONNX file can be further "
                "ahead."
            ),
            *reasons,
        ]
    )


def soak(report: dict[str, Any]) -> str:
    codes = ", ".join(f"{count} {code}" for code, count in sorted(report["codes"].items()))
    sizes = report["resident_mib"]
    return "\n\n".join(
        [
            "### Endurance",
            (
                f"{report['calls']} calls ({codes}): resident memory {sizes[0]:.0f} MiB after the first fortieth, "
                f"{sizes[len(sizes) // 2]:.0f} MiB half way, {sizes[-1]:.0f} MiB at the end; "
                f"{report['bytes_per_call']:.1f} bytes a call over the second half; {where(report)} "
                "Command: `python benchmarks/serving_soak.py --world WORLD`."
            ),
        ]
    )


def where(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    # Server and client keep two cores busy themselves.
    busy = machine["load_average"] > 1.25 * machine["cores"]
    warning = (
        " Others used the machine: only CPU times compare, and latencies are those of a busy machine." if busy else ""
    )
    return (
        f"{machine['cores']} cores of {machine['cpu']} at a load average of {machine['load_average']:.0f}, "
        f"onnxruntime {versions['onnxruntime']}, faiss {versions['faiss-cpu']}.{warning}"
    )


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
