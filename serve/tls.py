"""Encryption: certificates read again when their files change, and which addresses need them."""

from __future__ import annotations

import ipaddress
import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from retrieval_kd.errors import ServeError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CertificateFiles:
    """PEM files of a server.

    Attributes:
        certificate: The server's certificate and the intermediates above it.
        key: The certificate's private key.
        client_ca: Authorities of client certificates; when set, a client without one is refused (mTLS).
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """Return credentials that look at the files at every handshake and take a new pair once it fits.

    Raises:
        ServeError: a file cannot be read, or the key is not the certificate's.
    """
    reloading = _Reloading(files)
    return grpc.dynamic_ssl_server_credentials(
        reloading.configuration,
        reloading.changed,  # type: ignore[arg-type]  # the stubs forget that None means "no change"
        require_client_authentication=files.client_ca is not None,
    )


class _Reloading:
    """The pair in use; handshakes of several threads ask at once."""

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._paths = [path for path in (files.certificate, files.key, files.client_ca) if path is not None]
        self._lock = threading.Lock()
        self._stamp = self._stamps()
        self.configuration = _load(files)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new pair, or None to go on with the old one."""
        with self._lock:
            try:
                stamp = self._stamps()
                if stamp == self._stamp:
                    return None
                configuration = _load(self._files)
            except ServeError as error:
                # Certificate and key are written one after the other: the next handshake finds both.
                _log.error("the certificate known before stays: %s", error)
                return None
            self._stamp = stamp
            _log.info("%s: read again", self._files.certificate)
            return configuration

    def _stamps(self) -> list[tuple[int, int]]:
        try:
            return [(path.stat().st_mtime_ns, path.stat().st_ino) for path in self._paths]
        except OSError as error:
            raise ServeError(f"{error.filename}: cannot be read ({error.strerror}); give a PEM file") from None


def _load(files: CertificateFiles) -> grpc.ServerCertificateConfiguration:
    """Read and check a pair: gRPC itself takes a wrong key in silence and then fails every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password at hand OpenSSL would ask the terminal for one.
        context.load_cert_chain(files.certificate, files.key, password=b"")
        chain, key = files.certificate.read_bytes(), files.key.read_bytes()
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{files.certificate}, {files.key}: not a certificate and its key without a password ({error})"
        ) from None
    client_ca = None
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
            client_ca = files.client_ca.read_bytes()
        except (OSError, ssl.SSLError) as error:
            raise ServeError(f"{files.client_ca}: not certificates of authorities ({error}); give a PEM file") from None
    return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_safe_metrics_address(host: str, insecure: bool) -> None:
    """Refuse to serve metrics, which are never encrypted, where other machines can reach them.

    Raises:
        ServeError: says where to serve them, or how to insist.
    """
    if not insecure and not is_loopback(host):
        raise ServeError(
            f"--metrics-host {host} can be reached by other machines and metrics are not encrypted; serve them on "
            "127.0.0.1, or give --insecure where something in front encrypts"
        )


def require_safe_address(host: str, tls: CertificateFiles | None, insecure: bool) -> None:
    """Refuse to listen in plain text where other machines can reach it.

    Raises:
        ServeError: says how to encrypt, or how to insist.
    """
    if tls is None and not insecure and not is_loopback(host):
        raise ServeError(
            f"{host} can be reached by other machines and nothing is encrypted; give --tls-cert and --tls-key, "
            "or --insecure where something in front encrypts"
        )
