"""Published tables done again: each command is run, each figure compared with what is expected."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from retrieval_kd.errors import DataError, did_you_mean
from retrieval_kd.strict_yaml import NotYaml, read_yaml

_PROGRAM = "rkd "


@dataclass(frozen=True)
class Expected:
    """One figure of a table.

    Attributes:
        system: The system's name in the report.
        measure: The measure.
        value: The figure.
        tolerance: Largest difference that still counts as the same.
        set: The set it belongs to, where the command measures several collections; ``mean`` is over them.
    """

    system: str
    measure: str
    value: float
    tolerance: float
    set: str = ""

    def __post_init__(self) -> None:
        """Refuse a figure that everything or nothing would match."""
        for key in ("system", "measure", "set"):
            name = getattr(self, key)
            if not isinstance(name, str):
                raise DataError(f"{key} {name!r} is not a text; put a name that looks otherwise between quotes")
        for key in ("value", "tolerance"):
            number = getattr(self, key)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise DataError(f"{key} {number!r} of {self.system!r} is not a finite number")
        if self.tolerance < 0:
            raise DataError(f"tolerance {self.tolerance} of {self.system!r} must not be negative")


@dataclass(frozen=True)
class Table:
    """One published table: its name, the command that makes it, and what it must say."""

    name: str
    command: str
    expect: tuple[Expected, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one figure.

    Attributes:
        table: The table's name.
        expected: The figure.
        found: What was measured now; None when nothing was.
        problem: Why nothing was measured; empty otherwise.
    """

    table: str
    expected: Expected
    found: float | None
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Tell whether the figure was measured and lies within the tolerance."""
        # The tolerance of a rounded figure must not fail on the last bit of a float.
        return self.found is not None and abs(self.found - self.expected.value) <= self.expected.tolerance + 1e-12


def read_tables(path: Path, values: Mapping[str, str]) -> list[Table]:
    """Read a YAML list of ``name``, ``command``, ``expect`` and fill ``{key}`` in commands.

    Raises:
        DataError: not such a file, an unknown or missing key, a command that is not ``rkd``, or a ``{key}``
            without a value; names the entry.
    """
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read it ({error}); give a YAML list of tables") from None
    except NotYaml as error:
        raise DataError(f"{path}:{error.line}: not YAML ({error}); mend the line") from None
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{path}: not a list of tables; each has name, command and expect")
    tables: list[Table] = []
    for number, entry in enumerate(raw, start=1):
        where = f"{path}: table {number}"
        given = _checked(entry, Table, where)
        command = str(given["command"])
        for key, value in values.items():
            command = command.replace(f"{{{key}}}", value)
        if not command.startswith(_PROGRAM):
            raise DataError(f"{where}: command {command!r} does not start with {_PROGRAM.strip()}")
        if "{" in command:
            missing = command[command.index("{") + 1 :].split("}")[0]
            raise DataError(f"{where}: no value for {{{missing}}}; give it with --set {missing}=VALUE")
        try:
            shlex.split(command)
        except ValueError as error:
            raise DataError(f"{where}: command {command!r}: {str(error).lower()}; mend its quotes") from None
        if not isinstance(given["expect"], list) or not given["expect"]:
            raise DataError(f"{where}: expect is not a list of figures; give at least one")
        try:
            figures = tuple(Expected(**_checked(item, Expected, where)) for item in given["expect"])
        except DataError as error:
            raise DataError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
        tables.append(Table(str(given["name"]), command, figures))
    return tables


def reproduce(tables: Sequence[Table], announce: Callable[[str], None] = lambda _: None) -> Iterator[Outcome]:
    """Run each table's command in a process of its own and compare every figure."""
    for table in tables:
        announce(f"{table.name}: {table.command}")
        report, problem = _run(table.command)
        for expected in table.expect:
            if report is None:
                yield Outcome(table.name, expected, None, problem)
                continue
            try:
                yield Outcome(table.name, expected, figure(report, expected))
            except DataError as error:
                yield Outcome(table.name, expected, None, str(error))


def figure(report: Mapping[str, Any], expected: Expected) -> float:
    """Return the figure of a report or summary that an expectation speaks of.

    Raises:
        DataError: no such system, set or measure: a figure that is not there is no zero.
    """
    rows = {str(row["name"]): row for row in report["systems"]}
    if expected.system not in rows:
        raise DataError(f"no system {expected.system!r}{did_you_mean(expected.system, rows)}")
    row = rows[expected.system]
    if "sets" in row:
        values = {**row["sets"], "mean": row["mean"]}
        if expected.set not in values:
            raise DataError(f"no set {expected.set!r}{did_you_mean(expected.set, values)}")
        row = values[expected.set]
    elif expected.set:
        raise DataError(f"no set {expected.set!r}: the command measures one collection; leave set out")
    if expected.measure not in report["measures"]:
        raise DataError(f"no measure {expected.measure!r}{did_you_mean(expected.measure, report['measures'])}")
    return float(row[expected.measure])


def _run(command: str) -> tuple[dict[str, Any] | None, str]:
    arguments = shlex.split(command.removeprefix(_PROGRAM))
    done = subprocess.run(
        [sys.executable, "-m", "retrieval_kd.cli.main", *arguments, "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return None, said[-1].removeprefix("error: ")
    try:
        report = json.loads(done.stdout)
        return {"systems": report["systems"], "measures": report["measures"]}, ""
    except (json.JSONDecodeError, KeyError, TypeError):
        return None, "the command printed no report; give one that measures, such as rkd eval beir"


def _checked(entry: object, kind: type[Table] | type[Expected], where: str) -> dict[str, Any]:
    """Return a mapping that has the fields of a dataclass and no others."""
    known = {field.name: field.default is MISSING for field in fields(kind)}
    if not isinstance(entry, dict):
        raise DataError(f"{where}: {entry!r} is not a mapping of {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
    for key, required in known.items():
        if required and key not in entry:
            raise DataError(f"{where}: no {key!r}; needed are {', '.join(k for k, need in known.items() if need)}")
    return entry
