"""From exception to gRPC status: one table, and google.rpc details that a program can read."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from retrieval_kd.errors import ArtifactError, EncoderMismatch, ServeError

DOMAIN = "dense.retrieval"
MAX_VIOLATIONS = 16
"""Details travel as metadata, which gRPC cuts at 8 KiB: 256 blank texts must not hide behind a size error."""
MAX_MESSAGE_BYTES = 1000
"""A message may quote what the caller sent, and travels twice, once with three letters for a byte."""
MAX_DETAIL_BYTES = 2000
"""So may what a program reads, and travels in base64."""

_CUT = " ... "
_TEXT_BYTES = 500
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a request: the field's path, such as ``queries[3].text``, and what to do about it."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class InvalidRequestError(ServeError):
    """A request that can never be answered; carries every violation."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        shown = "; ".join(map(str, violations[:3]))
        more = f"; and {len(violations) - 3} more" if len(violations) > 3 else ""
        super().__init__(shown + more)
        self.violations = tuple(violations)


class OverloadedError(ServeError):
    """No room for the request now; ``retry_after`` seconds later there may be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReadyError(ServeError):
    """The server loads its index, or is about to stop."""


class UnauthenticatedError(ServeError):
    """The caller has not shown a token that the server knows."""


class PermissionDeniedError(ServeError):
    """The caller's token does not allow the call."""


class UnknownError(ServeError):
    """The request names a thing that does not exist."""

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


class PreconditionError(ServeError):
    """The request is sound, but not for what this server has loaded; ``subject`` names what it lacks."""

    def __init__(self, subject: str, message: str) -> None:
        super().__init__(message)
        self.subject = subject


class StoreError(ServeError):
    """The store could not be changed; what was there stays."""


class MovedError(ServeError):
    """Another version has become current, which the server will serve ``retry_after`` seconds later."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class _Row:
    code: grpc.StatusCode
    reason: str


_TABLE: dict[type[Exception], _Row] = {
    InvalidRequestError: _Row(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    OverloadedError: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    NotReadyError: _Row(grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    UnauthenticatedError: _Row(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDeniedError: _Row(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    UnknownError: _Row(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    PreconditionError: _Row(grpc.StatusCode.FAILED_PRECONDITION, "PRECONDITION_FAILED"),
    EncoderMismatch: _Row(grpc.StatusCode.FAILED_PRECONDITION, "ENCODER_MISMATCH"),
    StoreError: _Row(grpc.StatusCode.ABORTED, "STORE_UNCHANGED"),
    MovedError: _Row(grpc.StatusCode.ABORTED, "INDEX_MOVED"),
    ArtifactError: _Row(grpc.StatusCode.DATA_LOSS, "DAMAGED_INDEX"),
    TimeoutError: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
}
_INTERNAL = _Row(grpc.StatusCode.INTERNAL, "INTERNAL")


def to_status(error: Exception, request_id: str = "") -> status_pb2.Status:
    """Return the status of a failed request; what is not in the table is logged and shown as an id only."""
    row = _TABLE.get(type(error), _INTERNAL)
    message = str(error)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN)]
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    match error:
        case InvalidRequestError():
            details.append(_bad_request(error))
        case OverloadedError() | MovedError():
            details.append(_retry_info(error.retry_after))
        case UnknownError():
            name = _shortened(error.name, MAX_DETAIL_BYTES)
            details.append(error_details_pb2.ResourceInfo(resource_type=error.kind, resource_name=name))
        case PreconditionError():
            details.append(_precondition(error.subject, message))
        case EncoderMismatch():
            details.append(_precondition("encoder", message))
        case TimeoutError():
            message = "the request's time ran out before it was answered; allow more time or send less at once"
        case _ if row is _INTERNAL:
            _log.error("request %s failed", request_id, exc_info=error)
            message = f"internal error, request {request_id}; the server's log has the cause"
    status = status_pb2.Status(code=row.code.value[0], message=_shortened(message, MAX_MESSAGE_BYTES))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _precondition(subject: str, description: str) -> error_details_pb2.PreconditionFailure:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="SERVER", subject=subject, description=_shortened(description, MAX_DETAIL_BYTES)
    )
    return error_details_pb2.PreconditionFailure(violations=[violation])


def _bad_request(error: InvalidRequestError) -> error_details_pb2.BadRequest:
    request = error_details_pb2.BadRequest()
    for number, violation in enumerate(error.violations):
        field, description = (_shortened(text, _TEXT_BYTES) for text in (violation.field, violation.description))
        room = MAX_DETAIL_BYTES - request.ByteSize() - len(field.encode()) - len(description.encode())
        if number == MAX_VIOLATIONS or room < 0:
            field, description = "*", f"{len(error.violations) - number} more violations"
        request.field_violations.add(field=field, description=description)
        if field == "*":
            break
    return request


def _shortened(text: str, most: int) -> str:
    """Return a text of at most so many bytes: its beginning says what is wrong, its end what to do."""
    raw = text.encode()
    if len(raw) <= most:
        return text
    end = (most - len(_CUT)) // 2
    return raw[:end].decode(errors="ignore") + _CUT + raw[-end:].decode(errors="ignore")


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(math.ceil(seconds * 1e3))
    return info
