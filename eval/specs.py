"""What ``--system`` says, read strictly: ``[NAME=]KIND[:TARGET][,KEY=VALUE...]``.

For example ``bm25``; ``model:all-MiniLM-L6-v2,dim=128``; ``index:STORE,encoder=DIR``; ``server:HOST:PORT``;
``run:FILE.trec``; ``mine=pair:runs/x/encoder,documents=runs/x/document-encoder``; and from the runs of systems named
so, ``rerank:MODEL,over=bm25,depth=50``, ``rrf:bm25+mine,k=60`` and ``weighted:bm25+mine,weights=0.3+0.7``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from retrieval_kd.errors import DataError, did_you_mean

_PATTERN = re.compile(r"(?:(?P<name>[^=:,+]+)=)?(?P<kind>[a-z0-9-]+)(?::(?P<rest>.*))?", flags=re.DOTALL)
# A comma starts an option only where a key follows, so that paths and prefixes may hold commas.
_OPTION = re.compile(r",(?=[a-z_]+=)")

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "bm25": (),
    "model": ("dim", "max_length", "query_prefix", "document_prefix"),
    "pair": ("documents", "dim", "same_space"),
    "index": ("encoder",),
    "server": (),
    "run": (),
    "pyserini": ("k1", "b"),
    "rerank": ("over", "depth", "max_length"),
    "rrf": ("k",),
    "weighted": ("weights", "normalise"),
}


@dataclass(frozen=True)
class SystemSpec:
    """One ``--system``.

    Attributes:
        kind: One of :data:`OPTIONS`.
        target: The model, store, address, file or component names; empty for BM25.
        name: What tables print; chosen from the target when empty.
        options: The ``KEY=VALUE`` parts.
    """

    kind: str
    target: str = ""
    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> SystemSpec:
        """Read a specification.

        Raises:
            DataError: no such kind or key (the nearest is suggested), a target missing or superfluous,
                or a key given twice.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise DataError(f"--system {text!r}: write [NAME=]KIND[:TARGET][,KEY=VALUE], such as model:FOLDER,dim=128")
        kind = match["kind"]
        if kind not in OPTIONS:
            raise DataError(f"--system {text!r}: no kind {kind!r}{did_you_mean(kind, OPTIONS)}")
        target, *pairs = _OPTION.split(match["rest"] or "")
        if (kind == "bm25") == bool(target):
            wanted = "takes no target" if target else f"needs a target, as in {kind}:TARGET"
            raise DataError(f"--system {text!r}: {kind} {wanted}")
        options: dict[str, str] = {}
        for key, _, value in (pair.partition("=") for pair in pairs):
            if key not in OPTIONS[kind]:
                raise DataError(f"--system {text!r}: {kind} has no option {key!r}{_known(key, OPTIONS[kind])}")
            if key in options:
                raise DataError(f"--system {text!r}: {key} is given twice; keep one")
            options[key] = value
        return cls(kind, target, match["name"] or "", options)

    def __str__(self) -> str:
        """Return the specification as it could be typed."""
        name = f"{self.name}=" if self.name else ""
        target = f":{self.target}" if self.target else ""
        return f"{name}{self.kind}{target}" + "".join(f",{key}={value}" for key, value in self.options.items())

    @property
    def reference(self) -> str:
        """Return how other specifications call this one: its name, or its kind where it has none."""
        return self.name or self.kind

    @property
    def components(self) -> tuple[str, ...]:
        """Return the references of the systems whose runs this one starts from."""
        if self.kind == "rerank":
            return (self.options.get("over", "bm25"),)
        return tuple(self.target.split("+")) if self.kind in ("rrf", "weighted") else ()

    def integer(self, key: str, default: int) -> int:
        """Return an option as a whole number of at least 1."""
        text = self.options.get(key, str(default))
        if not (text.isascii() and text.isdigit() and int(text) >= 1):
            raise DataError(f"--system {self}: {key} {text!r} is not a whole number of at least 1")
        return int(text)

    def numbers(self, key: str, default: str = "") -> list[float]:
        """Return an option such as ``0.3+0.7`` as numbers."""
        text = self.options.get(key, default)
        try:
            return [float(part) for part in text.split("+")]
        except ValueError:
            raise DataError(f"--system {self}: {key} {text!r} is not a list of numbers such as 0.3+0.7") from None


def in_order(specs: Sequence[SystemSpec]) -> list[SystemSpec]:
    """Return the specifications with every system after those whose runs it needs.

    BM25 is added where only a reranker asks for it.

    Raises:
        DataError: two specifications share a reference, or a component is unknown or goes round in a circle.
    """
    by_reference: dict[str, SystemSpec] = {}
    for spec in specs:
        if spec.reference in by_reference:
            raise DataError(
                f"--system {spec}: another one is called {spec.reference!r} too; give it a name: NAME={spec}"
            )
        by_reference[spec.reference] = spec
    if any("bm25" in spec.components for spec in specs):
        by_reference.setdefault("bm25", SystemSpec("bm25"))
    ordered: dict[str, SystemSpec] = {}

    def visit(spec: SystemSpec, above: tuple[str, ...]) -> None:
        if spec.reference in above:
            raise DataError(f"--system {spec}: it needs its own result; name other systems")
        for component in spec.components:
            if component not in by_reference:
                raise DataError(f"--system {spec}: no system {component!r}{did_you_mean(component, by_reference)}")
            visit(by_reference[component], (*above, spec.reference))
        ordered.setdefault(spec.reference, spec)

    for spec in specs:
        visit(spec, ())
    return list(ordered.values())


def needed(specs: Sequence[SystemSpec], reference: str) -> list[SystemSpec]:
    """Return a system and those whose runs it needs, itself last; ``specs`` is in the order of :func:`in_order`."""
    wanted = {reference}
    for spec in reversed(specs):
        if spec.reference in wanted:
            wanted.update(spec.components)
    return [spec for spec in specs if spec.reference in wanted]


def require_rerank_depth(spec: SystemSpec, depth: int) -> None:
    """Refuse a reranker that asks for more documents than its first stage gives it.

    Raises:
        DataError: its depth is more than ``depth``.
    """
    if spec.kind == "rerank" and spec.integer("depth", min(depth, 100)) > depth:
        raise DataError(f"--system {spec}: depth is more than the {depth} documents retrieved; raise --depth")


def _known(key: str, options: Sequence[str]) -> str:
    return did_you_mean(key, options) if options else "; it has none"
