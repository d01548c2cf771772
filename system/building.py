"""What a config's `_target_` may build: a class of a file at the repository's root, of the kind that is asked for.

A config may come with somebody's checkpoint, and a name in it could be that of any code on this machine. So the name is
looked up in the text of our own files before anything is imported, and the settings are plain values.
"""

import ast
import importlib
import re
from collections.abc import Mapping
from pathlib import Path

from system import UserError
from system.settings import arguments, nested

ROOT = Path(__file__).resolve().parents[1]


def build(section: Mapping, base: type, key: str):
    """The object that a section describes: its `_target_`, a subclass of `base`, with the other keys as arguments.

    Raises UserError for any other target, and for keys or values that the constructor's annotations do not name.
    """
    cls, given = described(section, base, key)
    try:
        return cls(**given)
    except ValueError as error:  # of the maths, which knows no commands
        raise UserError(str(error)) from None


def described(section: Mapping, base: type, key: str) -> tuple[type, dict]:
    """The class and the arguments of what `build` builds. Raises UserError as `build` does."""
    if not isinstance(section, Mapping) or "_target_" not in section:
        raise UserError(f"{key} has no _target_; needed: {_needed(base)}")
    cls = class_of(section["_target_"], base, f"{key}._target_")
    settings = {name: value for name, value in section.items() if name != "_target_"}
    for name, _ in nested(settings, key):
        if re.search(r"\._\w*_$", name):
            raise UserError(f"{name} is no setting; needed: plain values beside {key}._target_")
    return cls, arguments(cls, settings, key)


def class_of(target, base: type, key: str) -> type:
    """The class named "module.Class", which <module>.py at the root defines. Raises UserError for any other."""
    module, _, name = target.partition(".") if isinstance(target, str) else ("", "", "")
    path = ROOT / f"{module}.py"
    if path in ROOT.glob("*.py") and name in defined_in(path):
        loaded = importlib.import_module(module)
        found = getattr(loaded, name, None) if Path(loaded.__file__ or "").resolve() == path else None
        if isinstance(found, type) and issubclass(found, base) and found is not base:
            return found
    raise UserError(f"{key}={target!r:.100}; needed: {_needed(base)}")


def defined_in(path: Path) -> set[str]:
    """The names of a file's own classes, from its text alone."""
    return {node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ClassDef)}


def _needed(base: type) -> str:
    return f"module.Class, a {base.__name__} that a file at the repository's root defines"
