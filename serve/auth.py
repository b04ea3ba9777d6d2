"""Bearer tokens from a file that is read again when it changes: who may read, who may administer.

    # role  token                              a comment
    read    4f0d8c0e5a6b4d1c9e2f7a8b3c6d5e4f   web shop
    admin   9b1c...                            build job

Tokens are compared as digests, every one of them and in constant time, so that neither the answer's time
nor a partial match tells a guesser anything.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

from retrieval_kd.errors import ServeError
from serve.errors import PermissionDeniedError, UnauthenticatedError

SHORTEST_TOKEN = 16
_CHECK_SECONDS = 1.0
_ADMIN = "/dense.retrieval.v1.IndexAdminService/"
_log = logging.getLogger(__name__)


class Role(IntEnum):
    """What a token allows; a higher role includes the lower."""

    READ = 1
    ADMIN = 2


def required_role(method: str) -> Role:
    """Return the role that a full method name needs."""
    return Role.ADMIN if method.startswith(_ADMIN) else Role.READ


class TokenFile:
    """The tokens of a file, at most a second old."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ServeError: it cannot be read, a line is not a role and a token, or there is no token; names the line.
        """
        self._path = path
        self._stamp = _stamp(path)
        self._roles = _read(path)
        self._checked = time.monotonic()
        self._complaint: tuple[object, str] | None = None

    def authorise(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Refuse a call whose token is missing, unknown, or of too low a role.

        Raises:
            UnauthenticatedError: no token, or none that the file has.
            PermissionDeniedError: the token's role does not allow the method.
        """
        self._refresh()
        role = self._role(_bearer(metadata))
        if role is None:
            raise UnauthenticatedError("no token that this server knows; send 'authorization: Bearer TOKEN'")
        if role < required_role(method):
            raise PermissionDeniedError(f"{method} needs the role {required_role(method).name.lower()}")

    def _role(self, token: str) -> Role | None:
        given = _digest(token)
        found = None
        for digest, role in self._roles:
            if hmac.compare_digest(given, digest):
                found = role
        return found

    def _refresh(self) -> None:
        """Read the file again if it has changed; a broken one leaves the tokens that were known."""
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        stamp = None
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._roles = _read(self._path)
                self._stamp = stamp
                _log.info("%s: %d tokens", self._path, len(self._roles))
            self._complaint = None
        except ServeError as error:
            complaint = (stamp, str(error))
            if complaint != self._complaint:
                _log.error("the tokens known before stay: %s", error)
            self._complaint = complaint


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise ServeError(f"{path}: cannot be read ({error.strerror}); give a file of tokens") from None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _read(path: Path) -> list[tuple[bytes, Role]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"{path}: cannot be read ({error}); give a file of tokens") from None
    roles = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2 or words[0].upper() not in Role.__members__:
            raise ServeError(f"{path}:{number}: not 'read TOKEN' or 'admin TOKEN'; mend the line")
        if len(words[1]) < SHORTEST_TOKEN:
            raise ServeError(
                f"{path}:{number}: the token has fewer than {SHORTEST_TOKEN} characters; "
                "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        if not words[1].isascii():
            raise ServeError(f"{path}:{number}: the token is not ASCII, so no header can carry it; make another one")
        roles.append((_digest(words[1]), Role[words[0].upper()]))
    if not roles:
        raise ServeError(f"{path}: has no token, so nobody could call; add 'read TOKEN'")
    return roles


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str) and value[:7].lower() == "bearer ":
            return value[7:].strip()
    return ""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
