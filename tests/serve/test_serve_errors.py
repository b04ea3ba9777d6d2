"""From exception to status: codes, reasons, details."""

import logging
from collections.abc import Callable
from urllib.parse import quote

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from retrieval_kd.errors import ArtifactError, EncoderMismatch, ServeError
from serve.errors import (
    MAX_VIOLATIONS,
    InvalidRequestError,
    MovedError,
    NotReadyError,
    OverloadedError,
    PermissionDeniedError,
    PreconditionError,
    StoreError,
    UnauthenticatedError,
    UnknownError,
    Violation,
    to_status,
)


def read(status: status_pb2.Status) -> dict[str, Message]:
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
        error_details_pb2.RequestInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
    )
    found = {}
    for detail in status.details:
        for kind in kinds:
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (InvalidRequestError([Violation("top_k", "is 0")]), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (OverloadedError("full", 0.2), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (NotReadyError("loading"), grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (UnauthenticatedError("no token"), grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
        (PermissionDeniedError("role"), grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
        (UnknownError("index", "v1", "no v1"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
        (PreconditionError("reranker", "none"), grpc.StatusCode.FAILED_PRECONDITION, "PRECONDITION_FAILED"),
        (EncoderMismatch("space"), grpc.StatusCode.FAILED_PRECONDITION, "ENCODER_MISMATCH"),
        (StoreError("read-only"), grpc.StatusCode.ABORTED, "STORE_UNCHANGED"),
        (MovedError("moved", 0.5), grpc.StatusCode.ABORTED, "INDEX_MOVED"),
        (ArtifactError("ids.npy: torn"), grpc.StatusCode.DATA_LOSS, "DAMAGED_INDEX"),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
)
def test_each_error_has_its_code_and_reason(error: Exception, code: grpc.StatusCode, reason: str) -> None:
    """Clients branch on code and reason; a changed one changes what they retry."""
    status = to_status(error)
    info = read(status)["ErrorInfo"]
    assert status.code == code.value[0]
    assert (info.reason, info.domain) == (reason, "dense.retrieval")


def test_retry_info_says_when_to_come_back() -> None:
    """Without it clients retry a slow server into the ground."""
    for error in (OverloadedError("full", 0.2), MovedError("moved", 0.2)):
        assert read(to_status(error))["RetryInfo"].retry_delay.ToMilliseconds() == 200
    assert "RetryInfo" not in read(to_status(TimeoutError()))


def test_internal_errors_show_an_id_and_log_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    """A cause on the wire leaks paths and texts; a cause nowhere cannot be mended."""
    with caplog.at_level(logging.ERROR):
        status = to_status(RuntimeError("secret"), "r-17")
    assert "secret" not in status.message
    assert "r-17" in status.message
    assert read(status)["RequestInfo"].request_id == "r-17"
    assert "r-17" in caplog.text
    assert "secret" in caplog.text


def test_details_stay_below_the_size_of_metadata() -> None:
    """256 violations as metadata exceed gRPC's 8 KiB, and the caller would see a transport error instead."""
    violations = [Violation(f"queries[{i}].vector.floats", "x" * 60) for i in range(256)]
    status = to_status(InvalidRequestError(violations))
    listed = read(status)["BadRequest"].field_violations
    assert status.ByteSize() < 8192 // 2
    assert len(listed) == MAX_VIOLATIONS + 1
    assert listed[-1].description == f"{256 - MAX_VIOLATIONS} more violations"
    assert status.message.endswith("and 253 more")


@pytest.mark.parametrize("letter", ["x", "ü", "\U0001f600"])
@pytest.mark.parametrize(
    "refusal",
    [
        lambda long: InvalidRequestError([Violation(f"fields.{long[:900]}", f"is {long[:900]}; mend it")] * 16),
        lambda long: InvalidRequestError([Violation("options.filter", f"no field {long} is stored; known: year")]),
        lambda long: UnknownError("index", long, f"no index {long}; give one that is there"),
        lambda long: PreconditionError("fields", f"no field {long}; build the index with it"),
    ],
)
def test_what_a_refusal_quotes_fits_into_metadata(refusal: Callable[[str], ServeError], letter: str) -> None:
    """Beyond 16 KiB gRPC drops the status, and the caller reads of a stream that was removed and not what is wrong."""
    error = refusal(letter * 100_000)
    status = to_status(error, "r-17")
    assert len(quote(status.message)) + status.ByteSize() * 4 / 3 < 8192
    assert status.message[:7] == str(error)[:7]
    assert status.message[-8:] == str(error)[-8:]


def test_what_is_lacking_is_named_for_programs() -> None:
    """Without the resource's name a program cannot tell a missing version from a missing document."""
    missing = read(to_status(UnknownError("index_version", "0000000009-cafe", "no such version")))["ResourceInfo"]
    assert (missing.resource_type, missing.resource_name) == ("index_version", "0000000009-cafe")
    (lacking,) = read(to_status(EncoderMismatch("another space")))["PreconditionFailure"].violations
    assert (lacking.subject, lacking.description) == ("encoder", "another space")
