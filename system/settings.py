"""Settings: dataclasses made of the plain values that YAML and Hydra give. Types and checks stand at the field.

    @dataclass(frozen=True)
    class Train:
        max_steps: Annotated[int, at_least(1)] = 1800
        grad_clip: Annotated[float, above(0)] | None = 1.0

`parse(Train, {"max_steps": 4e1}, "train")` is Train(40, 1.0); with 0, the error is "train.max_steps=0; needed: a whole
number of at least 1".
"""

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from system import UserError
from system.limits import LAYERS

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
MISSING = "???"  # in a YAML file: the key must be given
DEEPEST = 20  # levels of a config


@dataclass(frozen=True)
class Check:
    """What a value must be beside its type: Annotated[int, at_least(1)]."""

    needed: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Check:
    return Check(f"of at least {least}", lambda value: value >= least)


def at_most(most: float) -> Check:
    return Check(f"of at most {most}", lambda value: value <= most)


def above(bound: float) -> Check:
    return Check(f"above {bound}", lambda value: value > bound)


def between(low: float, high: float) -> Check:
    """[low, high)"""
    return Check(f"in [{low}, {high})", lambda value: low <= value < high)


Count = Annotated[int, at_least(0)]  # 0 = never, or none
Positive = Annotated[int, at_least(1)]
Kind = Literal["sample_scaled", "sample_raw", "moments_logvar", "mean_std"]  # of latents, see data/encoding.py
Names = Annotated[tuple[str, ...], Check("none of them twice", lambda names: 0 < len(names) == len(set(names)))]
PerChannel = float | tuple[float, ...]  # a number, or one per channel; meta.json has lists


def parse(cls: type, values: Mapping, where: str = ""):
    """A dataclass of plain values; `where` is its section's key. Raises UserError for the first that does not fit."""
    given = arguments(cls, values, where)
    try:
        return cls(**given)
    except UserError as error:  # of several fields together
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def parse_known(cls: type, values: Mapping, source: Any):
    """As `parse`, of a file: its other keys are left out. Raises UserError, which begins with the file's name."""
    names = {field.name for field in fields(cls)}
    try:
        return parse(cls, {key: value for key, value in values.items() if key in names})
    except UserError as error:
        raise UserError(f"{source} is damaged: {error}") from None


def arguments(cls: type, values: Mapping, where: str = "") -> dict[str, Any]:
    """The values as the annotated arguments of a class's constructor; `from_` is the key `from`. Raises UserError."""
    hints = get_type_hints(cls.__init__, include_extras=True)
    parameters = inspect.signature(cls.__init__).parameters.values()
    taken = {p.name.removesuffix("_"): p for p in parameters if p.name in hints and _is_plain(hints[p.name])}
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={_shown(values)}; needed: a section of the keys {', '.join(taken)}")
    dot, given = where and f"{where}.", {}
    for key, value in values.items():
        if key not in taken:
            raise UserError(f"unknown key '{dot}{key}'{_did_you_mean(str(key), list(taken), dot)}")
        if value != MISSING:
            given[taken[key].name] = convert(value, hints[taken[key].name], dot + key)
    for key, p in taken.items():
        if p.default is p.empty and p.name not in given:
            raise UserError(f"{dot}{key} is missing; needed: {_needed(hints[p.name])}")
    return given


def convert(value: Any, annotation: Any, key: str) -> Any:
    """One plain value as its annotation says. Raises UserError: `key=value; needed: ...`."""
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{key}= is empty; needed: a value, or {key}=null for none")
    try:
        return _fit(value, annotation, key)
    except (ValueError, OverflowError) as error:
        known = isinstance(error, UserError)  # of a section's own key
        raise error if known else UserError(f"{key}={_shown(value)}; needed: {_needed(annotation)}") from None


def _fit(value: Any, annotation: Any, key: str) -> Any:
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Any or is_dataclass(kind):
        return value if kind is Any or isinstance(value, kind) else parse(kind, value, key)
    if kind is Annotated:
        value = _fit(value, parts[0], key)
        if all(check.holds(value) for check in parts[1:]):
            return value
    elif kind in (Union, UnionType):
        for part in parts:
            with suppress(ValueError):
                return _fit(value, part, key)
    elif kind is Literal:
        word = ("off", "on")[value] if isinstance(value, bool) else value  # YAML reads a bare off as false
        if word in parts:
            return word
    elif kind in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        kinds = parts if kind is tuple and parts[-1] is not ... else parts[:1] * len(value)
        if len(kinds) == len(value):
            return (tuple if kind is tuple else list)(_fit(*pair, key) for pair in zip(value, kinds))
    elif kind in (dict, Mapping) and isinstance(value, kind):
        item = parts[1] if parts else Any
        return {_fit(name, str, key): _fit(held, item, f"{key}.{name}") for name, held in value.items()}
    elif kind in (bool, str, NoneType) and isinstance(value, kind):
        return value
    elif kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and kind(value) == value:
            return kind(value)
    raise ValueError


def check_fields(settings: Any) -> None:
    """Raises UserError where a field of a dataclass made by hand is not what its annotation says."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        convert(getattr(settings, field.name), hints[field.name], field.name)


def _is_plain(annotation: Any) -> bool:
    """Whether a config may give such an argument: not where a function belongs."""
    return Callable not in (annotation, get_origin(annotation)) and all(map(_is_plain, get_args(annotation)))


def _did_you_mean(key: str, keys: Sequence[str], dot: str) -> str:
    near = [dot + name for name in difflib.get_close_matches(key, keys)]
    return f"; did you mean {' or '.join(near)}?" if near else f"; needed: {', '.join(keys) or 'no key at all'}"


def _needed(annotation: Any) -> str:
    """An annotation in words."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return f"{_needed(parts[0])} {' and '.join(check.needed for check in parts[1:])}"
    if kind in (Union, UnionType, Literal):
        parts = [annotation] if kind is Literal else parts
        words = [str(w) for p in parts for w in (get_args(p) if get_origin(p) is Literal else [_needed(p)])]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if kind in (list, tuple, Sequence):
        number = f" of {len(parts)}" if kind is tuple and parts[-1] is not ... else ""
        return f"a list{number}, each {_needed(parts[0])}"
    return WORDS.get(annotation, "a section of keys")


def _shown(value: Any) -> str:
    """A value as a command line has it, in one line."""
    return " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())[:200]


def nested(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a container, at any depth."""
    if isinstance(values, Mapping):
        items = [(f"{where}.{key}" if where else str(key), value) for key, value in values.items()]
    else:
        items = [(f"{where}[{i}]", v) for i, v in enumerate(values)] if isinstance(values, (list, tuple)) else []
    for key, value in items:
        yield key, value
        yield from nested(value, key)


def leaves(values: Mapping, where: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nested dict; lists and empty sections are values."""
    items = nested(values, where)
    return {key: value for key, value in items if "[" not in key and (value == {} or not isinstance(value, Mapping))}


def refuse_interpolations(values: Any, source: str) -> None:
    """Raises UserError, which does not repeat it, where a config that came with a file has a `${...}`."""
    for key, value in nested(values):
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{source}: {key} refers to something else (${{...}}); needed: a plain value")


def refuse_layers(values: Any, source: str) -> None:
    """Raises UserError where a config that came with a file has more layers or the like than are built in a moment."""
    for key, value in nested(values):
        several = re.search("layer|block|depth|expert|label|group", key.rpartition(".")[2])
        if several and isinstance(value, int) and value > LAYERS:
            raise UserError(f"{source}: {key}={value:.10g}; needed: at most {LAYERS}")


def read_yaml(text: str | bytes, source: str) -> Any:
    """The plain values of YAML that came with a file. Raises UserError where it is damaged, or written to take long."""
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST or isinstance(event, yaml.AliasEvent):
                raise UserError(f"it has aliases, or more than {DEEPEST} levels")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: its config is damaged ({' '.join(str(error).split()):.200})") from None
