"""YAML of which nothing is lost and nothing is endless, with one line for whatever is wrong.

PyYAML lets the last of several equal keys win in silence, follows an alias into the node it stands in, and passes on
what Python says of a value that is not what its form promises.
"""

from __future__ import annotations

import reprlib
from typing import Any, ClassVar

import yaml

# Our files nest half a dozen levels; PyYAML and all that walks a recipe recurse, and Python ends that at some hundreds.
_DEEPEST = 50
_TAG = "tag:yaml.org,2002:"
_CONSTRUCTORS = yaml.SafeLoader.yaml_constructors


class NotYaml(Exception):
    """What is wrong with a text, and in which line, counted from 1; whoever gave the text knows where it is from."""

    def __init__(self, problem: str, line: int) -> None:
        """Take both."""
        super().__init__(problem)
        self.line = line


def read_yaml(text: str) -> Any:
    """Return the only document of a text, as plain values.

    Raises:
        NotYaml: the text is not YAML, a key stands twice in one mapping, or values nest without end.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotYaml(f"character {error.character:#04x} is not allowed", line) from None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise NotYaml(problem, error.problem_mark.line + 1 if error.problem_mark else 1) from None


class _Loader(yaml.SafeLoader):
    # No key of ours takes a date: 2024-05-01 is a name like any other, and so is 2024-13-45.
    yaml_constructors: ClassVar = {**_CONSTRUCTORS, f"{_TAG}timestamp": _CONSTRUCTORS[f"{_TAG}str"]}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # The anchors of the nodes that are being read, outermost first; None for a node without one.
        self._open: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        alias = isinstance(event, yaml.AliasEvent)
        if alias and event.anchor in self._open:
            raise _refusal(f"alias {event.anchor!r} stands within what it repeats", event.start_mark)
        if len(self._open) == _DEEPEST:
            raise _refusal(f"nested more than {_DEEPEST} deep", event.start_mark)
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        if isinstance(node, yaml.MappingNode) and not alias:
            _refuse_repeated_keys(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):
            # A number of thousands of digits, 0x_, or a tag that the value does not fit.
            problem = f"{reprlib.repr(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise _refusal(problem, node.start_mark) from None


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Look at the keys as they are written: those that ``<<`` merges in may well be overridden."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        first = lines.setdefault((key.tag, key.value), 0)
        if first:
            raise _refusal(f"key {reprlib.repr(key.value)} stands in line {first} already", key.start_mark)
        lines[key.tag, key.value] = line


def _refusal(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
