"""``python -m serve.health HOST:PORT``: exit 0 when the server there answers requests, else say why not."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from retrieval_kd.errors import ServeError


def check_health(target: str, timeout: float = 2.0) -> None:
    """Ask a server whether it answers requests.

    Args:
        target: ``HOST:PORT``.
        timeout: Seconds to wait for the answer.

    Raises:
        ServeError: nothing listens there, or the server loads or drains.
    """
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise ServeError(f"{target}: no health answer ({error.code().name}); is the server running?") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise ServeError(f"{target}: the server is loading or stopping; ask again later")


def main() -> None:
    """Check the one target given; meant for container health checks."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m serve.health HOST:PORT\n")
        raise SystemExit(2)
    try:
        check_health(sys.argv[1])
    except ServeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
