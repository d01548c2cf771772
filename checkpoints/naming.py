"""Folder names made of settings: equal names, equal settings."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields

LONGEST = 200  # bytes; file systems take 255


def settings_name(settings, leave_out: Collection[str] = ()) -> str:
    """The fields of a dataclass that differ from their defaults: scale-1.5_seeds-0-9; "default" where none does.

    A section or a dictionary among them appears as its digest.
    """
    values, parts = asdict(settings), []
    for field in fields(settings):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in leave_out and getattr(settings, field.name) != default:
            value = values[field.name]
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            parts.append((field.name, digest(text)[:6] if isinstance(value, dict) else text))
    return name_of(parts) or "default"


def run_name(choices: Mapping[str, str], network: str) -> str:
    """[<experiment>-]<data>-<model>-<size>-<objective>: mnist-tread-XS4-edm. One named as its data is said once.

    choices: the config groups that were chosen. network: the network's own short name.
    """
    experiment = choices.get("experiment")
    first = [experiment] if experiment not in (None, "null", choices["data"]) else []
    return "-".join([*first, choices["data"], choices["model"], network, choices["objective"]])


def sweep_name(overrides: Sequence[str]) -> str:
    """Overrides as the name of a sweep's job: model-dit_train.lr-1e-3."""
    pairs = (override.partition("=") for override in overrides)
    return name_of((key, value.replace("/", "-")) for key, _, value in pairs)


def name_of(parts: Iterable[tuple[str, str]]) -> str:
    """(key, value), ... as a name that a shell need not quote: key-value_key-value, of at most LONGEST bytes.

    A value of other characters gets a digest, so that two values never share a name; so does a name that was cut.
    """
    names = []
    for key, value in parts:
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-")
        odd = f"-{digest(value)[:6]}" if plain != value else ""
        names.append(f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', key)}-{plain}{odd}")
    return shortened("_".join(names))


def shortened(name: str) -> str:
    """A name of at most LONGEST bytes: the end of a longer one becomes a digest."""
    start = name.encode()[: LONGEST - 13].decode(errors="ignore")
    return name if len(name.encode()) <= LONGEST else f"{start}-{digest(name)[:12]}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
