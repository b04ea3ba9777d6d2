"""JSON logs, one object a line; a request's text is in none of them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

ACCESS = logging.getLogger("serve.access")
ACCESS.setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object: time, level, logger, message, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as one line."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def use_json() -> None:
    """Let every handler of the root logger write JSON, and log each call."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
    ACCESS.setLevel(logging.INFO)
