"""``python -m serve.health HOST:PORT``: exit 0 when the server there answers requests, else say why not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from retrieval_kd.errors import ServeError


def check_health(target: str, timeout: float = 2.0, credentials: grpc.ChannelCredentials | None = None) -> None:
    """Ask a server whether it answers requests.

    Args:
        target: ``HOST:PORT``.
        timeout: Seconds to wait for the answer.
        credentials: Of an encrypted connection; plain text when None.

    Raises:
        ServeError: nothing listens there, or the server loads or drains.
    """
    with grpc.insecure_channel(target) if credentials is None else grpc.secure_channel(target, credentials) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise ServeError(f"{target}: no health answer ({error.code().name}); is the server running?") from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise ServeError(f"{target}: the server is loading or stopping; ask again later")


def main() -> None:
    """Check the one target given; meant for container health checks."""
    parser = argparse.ArgumentParser(prog="python -m serve.health", description="Ask a server whether it serves.")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--ca", type=Path, help="PEM file of the authority of the server's certificate")
    parser.add_argument("--cert", type=Path, help="PEM file of this client's certificate, for mTLS")
    parser.add_argument("--key", type=Path, help="PEM file of its private key")
    given = parser.parse_args()
    ca, key, cert = (None if path is None else path.read_bytes() for path in (given.ca, given.key, given.cert))
    credentials = None if ca is None else grpc.ssl_channel_credentials(ca, key, cert)
    try:
        check_health(given.target, credentials=credentials)
    except ServeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
