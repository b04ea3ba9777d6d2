"""The built-in demo collection: what the docstrings installed here say, asked for by their summary lines.

A query is the summary of a public module, class, function or method ("Return the shortest path between two
nodes"); its one relevant document is the rest of that docstring under the qualified name and signature.
The summary itself is not in the document, so the task is to find an explanation from its gist, not to
match a copy. Source files are parsed, never imported: nothing of what is read runs.

The collection is a function of the installed versions: the same Python and packages give the same
fingerprint, others another one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.collections.base import Document, Qrels, normalised
from retrieval_kd.collections.files import require_split, unknown_document
from retrieval_kd.errors import DataError
from retrieval_kd.progress import progress

# What installing this product with its extras brings, as far as it is rich in docstrings. transformers is
# left out: hundreds of model folders repeat one another's docstrings, and parsing them takes a minute.
PACKAGES = (
    "PIL", "accelerate", "click", "fsspec", "grpc", "huggingface_hub", "jinja2", "joblib", "matplotlib", "networkx",
    "numpy", "packaging", "pyarrow", "requests", "rich", "scipy", "sentence_transformers", "sklearn", "tensorboard",
    "torch", "tqdm", "typer", "urllib3", "werkzeug",
)  # fmt: skip
# Encoding runs at about 50 documents a second on two laptop cores: this many take a minute, and are
# enough that the right one is not found by chance.
MAX_DOCUMENTS = 3_000
MAX_TEXT = 1_000
_MIN_TEXT_WORDS = 12
_MIN_QUERY_WORDS = 4
_MAX_QUERY_WORDS = 30
_MAX_SIGNATURE = 160
_TRAIN_SHARE, _DEV_SHARE = 80, 8

_LEFT_OUT = frozenset(
    {"conftest", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
    | {"test", "testing", "tests", "turtledemo"}
)
_SIGNATURE_LINE = re.compile(r"[\w.]+\(.*\)(\s*->\s*.+)?", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\betc)[.!?](?=\s|$)")
_ROLE = re.compile(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`")
_BOILERPLATE = re.compile(r"(return (self|repr|len)|see|deprecated|alias|same as)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A docstring made into a query and its document."""

    query: str
    document: Document


class PythonDocs:
    """The demo collection; all of it is in memory."""

    name = "python-docs"

    def __init__(self, roots: Mapping[str, Path] | None = None) -> None:
        """Take the source folders by package name ("" for the standard library); the installed ones when None."""
        self._roots = installed_roots() if roots is None else roots

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 over the documents and the queries; judgements follow from the ids."""
        return fingerprint({"corpus": self.corpus_fingerprint, "queries": dict(self.queries())})

    @cached_property
    def corpus_fingerprint(self) -> str:
        """Return the sha256 over the documents."""
        return fingerprint([[document.doc_id, document.title, document.text] for document in self.documents()])

    def documents(self) -> Iterator[Document]:
        """Stream the documents by qualified name."""
        for entry in self._entries.values():
            yield entry.document

    def contents(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Return the content of each id; an unknown id is a :class:`DataError`."""
        contents = {}
        for doc_id in doc_ids:
            if doc_id not in self._entries:
                unknown_document(doc_id, self.name)
            contents[doc_id] = self._entries[doc_id].document.content
        return contents

    def queries(self) -> Mapping[str, str]:
        """Return query id to summary; a query's id is ``q:`` and its document's."""
        return {_query_id(doc_id): entry.query for doc_id, entry in self._entries.items()}

    def splits(self) -> tuple[str, ...]:
        """Return train, dev and test."""
        return ("train", "dev", "test")

    def qrels(self, split: str) -> Qrels:
        """Return the judgements of a split: one document of grade 1 for each query."""
        require_split(self.name, split, self.splits())
        return {_query_id(doc_id): {doc_id: 1} for doc_id in self._entries if _split(doc_id) == split}

    @cached_property
    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        files = [(package, root, path) for package, root in self._roots.items() for path in _source_files(root)]
        with progress("read docstrings", len(files), "files") as advance:
            for package, root, path in files:
                for entry in _entries_of(path, _module_name(package, root, path)):
                    entries.setdefault(entry.document.doc_id, entry)
                advance(1)
        if not entries:
            raise DataError(f"{self.name}: no docstrings in {len(files)} source files; install Python with its sources")
        return _sampled(_distinct(entries))


def installed_roots() -> dict[str, Path]:
    """Return the source folders of the standard library ("") and of :data:`PACKAGES`, as far as installed."""
    roots = {"": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # of a top-level name: finds it, imports nothing
        if spec is not None and spec.origin is not None and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def installed_versions() -> dict[str, str]:
    """Return the versions that decide what the collection holds, without reading any source."""
    versions = {"python": platform.python_version(), "documents": str(MAX_DOCUMENTS)}
    owners = importlib.metadata.packages_distributions()
    for package in filter(None, installed_roots()):
        versions[package] = ", ".join(sorted(importlib.metadata.version(name) for name in owners.get(package, [])))
    return versions


def _source_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if all(map(_is_public, path.relative_to(root).parts)))


def _is_public(part: str) -> bool:
    stem = part.removesuffix(".py")
    return stem == "__init__" or not (stem.startswith(("_", "test_")) or stem in _LEFT_OUT)


def _module_name(package: str, root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in (package, *parts) if part and part != "__init__")


def _entries_of(path: Path, module: str) -> Iterator[_Entry]:
    source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in other people's strings are not the reader's business
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # templates and files for other Python versions
    if module:
        yield from _entry(tree, module, f"module {module}")
    yield from _members(tree, module)


def _members(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[_Entry]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _entry(node, name, f"class {name}")
            yield from _members(node, name)
        else:
            yield from _entry(node, name, f"{name}{_signature(node)}")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = f"({ast.unparse(node.args)})"
    return text if len(text) <= _MAX_SIGNATURE else text[:_MAX_SIGNATURE] + "..."


def _entry(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, title: str
) -> Iterator[_Entry]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        return
    query, text = split_docstring(docstring)
    if _is_question(query) and len(text.split()) >= _MIN_TEXT_WORDS:
        yield _Entry(query, Document(name, title, text))


def split_docstring(docstring: str) -> tuple[str, str]:
    """Split a docstring into its summary and everything else.

    The summary is the first sentence of the first paragraph that is not a bare signature. Wherever the
    rest repeats it, in whatever case or spacing, it is taken out.

    Returns:
        ``(summary, rest)``, white space collapsed and cross-reference marks removed, the rest cut to
        :data:`MAX_TEXT` characters; either may be empty.
    """
    paragraphs = [_plain(part) for part in re.split(r"\n\s*\n", inspect.cleandoc(docstring))]
    if _SIGNATURE_LINE.fullmatch(paragraphs[0]):
        paragraphs = paragraphs[1:] or [""]
    end = _SENTENCE_END.search(paragraphs[0])
    summary = paragraphs[0][: end.start()] if end else paragraphs[0]
    rest = paragraphs[0][end.end() :] if end else ""
    body = " ".join(part for part in (rest.strip(), *paragraphs[1:]) if part)
    if summary and summary.lower() in body.lower():
        body = re.sub(re.escape(summary) + r"[.!?]?", "", body, flags=re.IGNORECASE)
    return summary.rstrip(":"), _cut(" ".join(body.split()))


def _plain(text: str) -> str:
    return " ".join(_ROLE.sub(r"\1", text).replace("``", "").replace("`", "").split())


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rpartition(" ")[0]


def _is_question(query: str) -> bool:
    return _MIN_QUERY_WORDS <= len(query.split()) <= _MAX_QUERY_WORDS and _BOILERPLATE.match(query) is None


def _distinct(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Keep the first by name of those with the same text or the same query: they cannot be told apart."""
    texts: set[str] = set()
    queries: set[str] = set()
    kept = {}
    for doc_id in sorted(entries):
        entry = entries[doc_id]
        text, query = normalised(entry.document.text), normalised(entry.query)
        if text not in texts and query not in queries:
            kept[doc_id] = entry
        texts.add(text)
        queries.add(query)
    return kept


def _sampled(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Keep at most :data:`MAX_DOCUMENTS`, those of least hash, so that every package keeps its share."""
    chosen = set(sorted(entries, key=lambda doc_id: _hash("sample", doc_id))[:MAX_DOCUMENTS])
    return {doc_id: entry for doc_id, entry in entries.items() if doc_id in chosen}


def _split(doc_id: str) -> str:
    bucket = _hash("split", doc_id) % 100
    if bucket < _TRAIN_SHARE:
        return "train"
    return "dev" if bucket < _TRAIN_SHARE + _DEV_SHARE else "test"


def _hash(purpose: str, doc_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{doc_id}".encode()).digest()[:8])


def _query_id(doc_id: str) -> str:
    return f"q:{doc_id}"
