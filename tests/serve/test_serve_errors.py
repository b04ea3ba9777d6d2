"""From exception to status: codes, reasons, details."""

import logging

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from serve.errors import (
    MAX_VIOLATIONS,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    Violation,
    to_status,
)


def read(status: grpc.Status) -> dict[str, Message]:
    raw = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = {}
    for detail in raw.details:
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
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
)
def test_each_error_has_its_code_and_reason(error: Exception, code: grpc.StatusCode, reason: str) -> None:
    """Clients branch on code and reason; a changed one changes what they retry."""
    status = to_status(error)
    info = read(status)["ErrorInfo"]
    assert status.code is code
    assert (info.reason, info.domain) == (reason, "dense.retrieval")


def test_retry_info_says_when_to_come_back() -> None:
    """Without it clients retry a slow server into the ground."""
    assert read(to_status(OverloadedError("full", 0.2)))["RetryInfo"].retry_delay.ToMilliseconds() == 200
    assert "RetryInfo" not in read(to_status(TimeoutError()))


def test_internal_errors_show_an_id_and_log_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    """A cause on the wire leaks paths and texts; a cause nowhere cannot be mended."""
    with caplog.at_level(logging.ERROR):
        status = to_status(RuntimeError("secret"))
    assert "secret" not in status.details
    request_id = status.details.split("request ")[1].split(";")[0]
    assert request_id in caplog.text
    assert "secret" in caplog.text


def test_details_stay_below_the_size_of_metadata() -> None:
    """256 violations as metadata exceed gRPC's 8 KiB, and the caller would see a transport error instead."""
    violations = [Violation(f"queries[{i}].vector.floats", "x" * 60) for i in range(256)]
    status = to_status(InvalidRequestError(violations))
    listed = read(status)["BadRequest"].field_violations
    assert len(listed) == MAX_VIOLATIONS + 1
    assert listed[-1].description == f"{256 - MAX_VIOLATIONS} more violations"
    assert status.details.endswith("and 253 more")
    assert sum(len(key) + len(value) for key, value in status.trailing_metadata) + len(status.details) < 8192 // 2
