"""Everything that decides how a server runs, in one value that its worker processes read as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serve.limits import Limits
from serve.tls import CertificateFiles, require_safe_address, require_safe_metrics_address

LOOPBACK = "127.0.0.1"
"""Where the administration has its port: reachable from this machine alone."""


@dataclass(frozen=True)
class ServeConfig:
    """How a server runs.

    Attributes:
        store: The index store.
        encoder: Folder of the exported query encoder.
        host: Address to listen on.
        port: Port to listen on; 0 lets the system choose.
        workers: Processes that share the port.
        threads: Threads of a worker's encoder and of its search pool; the cores shared out when None.
        reranker: Folder of an exported reranker.
        tls: Certificate files; plain text when None.
        insecure: Listen in plain text even where other machines can reach the address.
        tokens: File of bearer tokens; every caller may read when None.
        admin_port: Port of the administration on the loopback address; with tokens it is on the main port too.
        metrics_port: Port of the Prometheus metrics; none when None.
        metrics_host: Address of the metrics.
        trace: ``HOST:PORT`` of an OTLP collector.
        json_logs: Log JSON, and a line for each call.
        poll_seconds: How often the store is asked for its current version.
        drain_delay: Seconds between reporting NOT_SERVING and refusing calls, for load balancers to notice.
        drain_seconds: How long calls in flight may take when the server stops.
        reuse_port: Share the port with other processes; set for workers.
        limits: What requests have to keep to.
    """

    store: Path
    encoder: Path
    host: str = LOOPBACK
    port: int = 50051
    workers: int = 1
    threads: int | None = None
    reranker: Path | None = None
    tls: CertificateFiles | None = None
    insecure: bool = False
    tokens: Path | None = None
    admin_port: int | None = None
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK
    trace: str | None = None
    json_logs: bool = False
    poll_seconds: float = 2.0
    drain_delay: float = 0.0
    drain_seconds: float = 10.0
    reuse_port: bool = False
    limits: Limits = field(default_factory=Limits)

    def require_safe_addresses(self) -> None:
        """Refuse to listen in plain text where other machines can reach it.

        Raises:
            ServeError: says which address that is, and what to do.
        """
        require_safe_address(self.host, self.tls, self.insecure)
        if self.metrics_port is not None:
            require_safe_metrics_address(self.metrics_host, self.insecure)

    def to_json(self) -> str:
        """Return the value as JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> ServeConfig:
        """Read what :meth:`to_json` has written."""
        raw: dict[str, Any] = json.loads(text)
        for name in ("store", "encoder", "reranker", "tokens"):
            raw[name] = _path(raw[name])
        if raw["tls"] is not None:
            tls = raw["tls"]
            raw["tls"] = CertificateFiles(Path(tls["certificate"]), Path(tls["key"]), _path(tls["client_ca"]))
        return cls(**{**raw, "limits": Limits(**raw["limits"])})


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
