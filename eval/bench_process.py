"""The process in which one system is benched: reads a request from standard input, leaves its files, ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eval.bench import Load, bench_one
from eval.specs import SystemSpec
from retrieval_kd.errors import RkdError


def main() -> int:
    """Bench what standard input asks for; an error is one line on standard error."""
    request = json.load(sys.stdin)
    load = request["load"]
    try:
        bench_one(
            request["collection"],
            request["split"],
            [SystemSpec.parse(text) for text in request["specs"]],
            request["reference"],
            Load(**{**load, "cores": tuple(load["cores"])}),
            Path(request["cache"]),
            Path(request["into"]),
            request["distractors"],
        )
    except RkdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
