"""python -m data: inspects latents, indexes shards, converts other projects' latents into shards.

    python -m data inspect PATH [--json]                what it holds, what is wrong with it, what to do next
    python -m data index FOLDER [key=value ...]         meta.json and index for bare shards (configs/index.yaml)
    python -m data convert SOURCE FOLDER [key=value ..] another project's latents as shards (configs/convert.yaml)

Exit code 2 for a request that cannot be met; `inspect` exits with 1 if it finds something wrong.
"""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data.convert import Conversion, convert
from data.encoding import LatentEncoding
from data.inspect import as_text, inspect
from data.shards import finalize, read_manifest
from system import UserError, cli, printable
from system.settings import Kind, PerChannel, Positive, parse


@dataclass(frozen=True)
class Indexing:
    """The settings in configs/index.yaml."""

    kind: Kind = "sample_scaled"
    scale: PerChannel | None = None
    bias: PerChannel | None = None
    codec: dict[str, Any] | None = None
    flip: Literal["none", "both"] = "none"
    num_classes: Positive | None = None
    condition: Literal["class", "text", "none"] | None = None


def main(argv: list[str]) -> int:
    verb, arguments = cli.verb(argv, __doc__, ("inspect", "index", "convert"))
    if verb == "inspect":
        as_json = "--json" in arguments
        (path,), _ = _split(verb, [a for a in arguments if a != "--json"], 1)
        report = inspect(path)
        print(json.dumps(report) if as_json else printable(as_text(report)))
        return 1 if report["wrong"] else 0
    (*sources, target), overrides = _split(verb, arguments, 1 if verb == "index" else 2)
    if verb == "convert":
        manifest = convert(*sources, target, parse(Conversion, cli.load_config(verb, overrides)))
        after = f"; python -m data inspect {shlex.quote(target)} says more"
    else:
        settings = asdict(parse(Indexing, cli.load_config(verb, overrides)))
        if not Path(target).is_dir():
            raise UserError(f"no folder {target}")
        if overrides and read_manifest(Path(target)):
            raise UserError(f"{target} has a meta.json that says these things; remove it to index the shards anew")
        encoding = LatentEncoding(*(settings.pop(key) for key in ("kind", "scale", "bias")))
        manifest, after = finalize(Path(target), encoding, **settings), ", sound"
    counts = ", ".join(f"{n} {split}" for split, n in manifest["counts"].items())
    held = {"class": f"{manifest['num_classes']} classes", "text": "with texts", "none": "no condition"}
    held = f"{counts} entries of {manifest['kind']} {tuple(manifest['shape'])}, {held[manifest['condition']]}"
    print(f"{target}: {held}{after}")
    return 0


def _split(verb: str, arguments: list[str], count: int) -> tuple[list[str], list[str]]:
    """(paths, overrides) among the arguments of a verb."""
    paths = [a for a in arguments[:count] if "=" not in a or "/" in a.partition("=")[0] or Path(a).exists()]
    if "" in paths:
        raise UserError(f"python -m data {verb}: an empty path; needed: a folder or a file")
    overrides = arguments[len(paths) :]
    stray = [a for a in overrides if "=" not in a]
    if len(paths) < count or stray:
        found = f"found {stray[0]!r}" if stray else f"found {len(paths)}"
        needed = f"{count} path{'s' * (count > 1)}, then key=value settings"
        raise UserError(f"python -m data {verb} needs {needed}; {found}")
    return paths, overrides


if __name__ == "__main__":
    cli.command(main, __doc__)
