"""Reading a recipe: YAML to frozen dataclasses, strictly.

An unknown key, a value of the wrong type or an impossible value is an error that names the key's full
path. Where a section is expected and a single value is given, the value is the section's first field:
``collection: DIR`` means ``collection: {path: DIR}``.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from retrieval_kd.errors import RecipeError, did_you_mean
from retrieval_kd.recipes.schema import Recipe, StageSpec
from retrieval_kd.strict_yaml import NotYaml, read_yaml

Section = TypeVar("Section")


def shipped_recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package, sorted."""
    folder = resources.files("retrieval_kd.recipes")
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, then apply ``key.path=value`` overrides.

    Args:
        source: A name from :func:`shipped_recipes`, or a path that ends in ``.yaml`` or ``.yml``.
        overrides: Assignments such as ``student.layers=[0,5]``; values are read as YAML.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key or an impossible value; names the key.
    """
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise RecipeError(f"{source}: no such recipe file; rkd recipes lists the shipped ones")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{source}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    else:
        if source not in shipped_recipes():
            raise RecipeError(f"no recipe {source!r}{did_you_mean(source, shipped_recipes())}")
        text = resources.files("retrieval_kd.recipes").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    try:
        raw = read_yaml(text)
    except NotYaml as error:
        raise RecipeError(f"{source}:{error.line}: not YAML ({error}); mend the line") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys, this is {type(raw).__name__}; mend the file")
    for assignment in overrides:
        _override(raw, assignment)
    if isinstance(raw.get("stages"), dict):
        raise RecipeError("stages: not a list; a recipe without stages has their keys itself, such as schedule.epochs")
    if isinstance(raw.get("stages"), list):
        raw["stages"] = [_inheriting(stage, raw) for stage in raw["stages"]]
    recipe: Recipe = _read(Recipe, raw, "")
    return recipe


def section(kind: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """Read one section as strictly as a recipe's.

    Raises:
        RecipeError: an unknown key or an impossible value; names the key under ``where``.
    """
    read: Section = _read(kind, dict(values), where)
    return read


def resolved(part: Recipe | StageSpec) -> dict[str, Any]:
    """Return every key of a recipe or of a stage, defaults included, as plain JSON-serialisable values."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(part))
    return plain


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _inheriting(stage: Any, recipe: Mapping[str, Any]) -> Any:
    """Return a stage with what it does not name taken from the recipe; see :class:`StageSpec`."""
    if not isinstance(stage, dict):
        return stage
    shared = {field.name for field in dataclasses.fields(StageSpec)} & {
        field.name for field in dataclasses.fields(Recipe)
    }
    inherited = {key: recipe[key] for key in shared - {"name"} if key in recipe}
    for key in ("candidates", "schedule"):
        if isinstance(inherited.get(key), dict) and isinstance(stage.get(key), dict):
            stage = {**stage, key: {**inherited[key], **stage[key]}}
    return {**inherited, **stage}


def _override(raw: dict[str, Any], assignment: str) -> None:
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {assignment!r}: write KEY.PATH=VALUE, such as student.mode=symmetric")
    try:
        value = read_yaml(text)
    except NotYaml as error:
        raise RecipeError(f"--set {path}: the value is not YAML ({error}); mend or quote it") from None
    if value is None and text.strip().lower() not in ("null", "~"):
        # An unset shell variable, or a comment; null stands for a section's defaults, and only if it is written.
        raise RecipeError(f"--set {path}: no value after the =; give one, or leave --set {path} out")
    *parents, last = path.split(".")
    node: Any = raw
    for i, key in enumerate(parents):
        if isinstance(node, list):
            node = node[_position(node, key, path)]
            continue
        child = node.setdefault(key, {})
        if not isinstance(child, dict | list):
            # The section was written in its short form; the override opens it.
            child = node[key] = {_first_field(".".join(parents[: i + 1])): child} if child is not None else {}
        node = child
    if isinstance(node, list):
        node[_position(node, last, path)] = value
    else:
        node[last] = value


def _position(items: list[Any], key: str, path: str) -> int:
    """Return the place of a list's item that is called ``key``, or stands there counted from 0."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = [str(name) for name in names if name is not None]
    if known and not key.isdigit():
        raise RecipeError(f"--set {path}: nothing here is called {key!r}{did_you_mean(key, known)}")
    raise RecipeError(f"--set {path}: {key!r} is not a position in a list of {len(items)}; count from 0")


def _first_field(path: str) -> str:
    kind: Any = Recipe
    for key in path.split("."):
        kind = _section(get_type_hints(kind).get(key))
        if kind is None:
            raise RecipeError(f"--set {path}: no such section")
    return dataclasses.fields(kind)[0].name


def _section(annotation: Any) -> Any:
    """Return the dataclass an annotation stands for, looking through ``X | None``."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _read(annotation: Any, value: Any, where: str) -> Any:
    origin = get_origin(annotation)
    if annotation is StageSpec:
        return _read_stage(value, where)
    if dataclasses.is_dataclass(annotation):
        return _read_section(annotation, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(annotation):
            return None
        return _read(next(option for option in get_args(annotation) if option is not type(None)), value, where)
    if origin is Literal:
        if value not in get_args(annotation):
            raise RecipeError(f"{where}: {value!r}{did_you_mean(str(value), map(str, get_args(annotation)))}")
        return value
    if origin is tuple:
        return _read_tuple(get_args(annotation), value, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: {value!r} is not a mapping; write key: value pairs")
        return value
    return _read_scalar(annotation, value, where)


def _read_section(kind: Any, value: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        value = {next(iter(fields)): value} if value is not None else {}
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            raise RecipeError(f"{prefix}{key}: unknown key{did_you_mean(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise RecipeError(f"{prefix}{name}: missing; every {where or 'recipe'} needs it")
    return kind(**{key: _read(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _read_stage(value: Any, where: str) -> StageSpec:
    """Read a stage; what is wrong in it is told as in a recipe, after the stage's name."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise RecipeError(f"{where}: a stage is a mapping with a name; write name: warmup")
    try:
        stage: StageSpec = _read_section(StageSpec, value, "")
    except RecipeError as error:
        raise RecipeError(f"stage {name!r}: {error}") from None
    return stage


def _read_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"{where}: {value!r} is not a list; write [a, b]")
    if kinds[-1] is Ellipsis:
        return tuple(_read(kinds[0], item, f"{where}.{i}") for i, item in enumerate(value))
    if len(value) != len(kinds):
        raise RecipeError(f"{where}: {len(value)} values, it takes {len(kinds)}")
    return tuple(_read(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text because it has no dot.
        try:
            value = float(value)
        except ValueError:
            raise RecipeError(f"{where}: {value!r} is not a number; write one") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not kind:
        raise RecipeError(f"{where}: {value!r} is {type(value).__name__}, it takes {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise RecipeError(f"{where}: {value} is not a finite number; write one")
    return value
