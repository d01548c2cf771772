"""Command lines: Hydra overrides become a config, and a user's mistake one line on stderr with exit code 2.

HYDRA_FULL_ERROR=1 shows the traceback of such a line.
"""

import contextlib
import difflib
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from system import UserError, printable
from system.launchers import own_process
from system.processes import claim_report, connection_lost, end_processes, roll_call
from system.settings import leaves
from system.surroundings import settle_in

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
EXIT_INTERRUPTED = 130  # by Ctrl-C
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
# An OSError here is a path that cannot be read or written, a full disk, ...: nothing that a traceback would explain.
USER_ERRORS = (UserError, OSError, HydraException, OmegaConfBaseException)
# Keys, by their last part, whose values are paths or names: taken as they are, whatever characters they hold.
LITERAL = {
    "ckpt", "weak_ckpt", "init_from", "resume", "images", "from", "ref", "out", "path", "results_dir", "run_name",
    "digits", "fashion", "source", "vae", "extractor_weights", "prompts", "text_encoder", "clip",
}  # fmt: skip
HYDRAS_OWN = re.compile(
    "(-[hcprmi]|-s?c|-c[pnd]|--(help|hydra-help|version|cfg|resolve|package|run|multirun|info|shell-completion"
    "|experimental-rerun|config-(path|name|dir)))(=.*)?"
)
GUIDED = "guidance=cfg scale=2 or, of train.py's previews, guidance@preview=cfg preview.scale=2"
# Keys that people bring along from other programs: what they are here.
MEANT = {
    "lr": "train.lr", "learning_rate": "train.lr", "batch_size": "train.global_batch_size",
    "epochs": "train.max_steps, counted in steps", "steps": "train.max_steps", "seed": "seeds, such as seeds=0-9",
    "train.seed": "seed", "n": "seeds=0-9, of sample.py and fid.py", "num_samples": "seeds=0-9",
    "cfg": GUIDED, "guidance_scale": GUIDED, "cfg_scale": GUIDED, "guidance": "guidance@preview or guidance@eval",
    "class": "class_idx", "resolution": "data.input_size of train.py, size of encode_latents.py",
    "device": "CUDA_VISIBLE_DEVICES in front of the command, empty for the CPU",
}  # fmt: skip


def load_config(name: str, overrides: Sequence[str]) -> dict:
    """configs/<name>.yaml with the command line's overrides, as plain values. An unknown key or group is an error."""
    overrides = literal_paths(overrides)
    # Within train.py Hydra is at work already, on the same folder.
    at_work = GlobalHydra.instance().is_initialized()
    with contextlib.nullcontext() if at_work else initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return plain(compose(name, overrides=overrides))


def plain(config: DictConfig) -> dict:
    """The values of a composed config; what must be given and is not, is "???"."""
    return OmegaConf.to_container(config, resolve=True)


def literal_paths(overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Overrides with their paths quoted for Hydra, whose grammar gives =, spaces, commas and parentheses a meaning.

    A value that is quoted already stays; `~` is the home folder. sweep: commas separate several paths, unless the whole
    is one that exists. Raises UserError for paths without a key, and for options that are not Hydra's own.
    """
    for before, word in zip(("", *overrides), overrides):
        if word.startswith("-") and not HYDRAS_OWN.fullmatch(word):
            raise UserError(f"found {word}; needed: key=value, without dashes")
        if "=" not in word and "-" not in (word[:1], before[:1]) and not re.match("~[^/]", word):  # ~key deletes it
            raise UserError(f"found {word}; needed: key=value, as in ckpt={word}, images={word} or data.path={word}")
    return [_literal_path(override, sweep) for override in overrides]


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """`a=1,2 b=3` -> [[a=1, b=3], [a=2, b=3]], in Hydra's grammar, as in `train.py -m`."""
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(literal_paths(overrides, sweep=True))
    ]
    return [list(row) for row in itertools.product(*choices)]


def swept_keys(argv: Sequence[str]) -> set[str]:
    """The keys to which a command line of `train.py -m` gives several values."""
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group for override in parsed if override.is_sweep_override()}


def _literal_path(override: str, sweep: bool) -> str:
    key, _, value = override.partition("=")
    if key.lstrip("+") == "prompt" and value not in ("", "null"):  # words, whatever they hold
        return f"{key}=" + _quoted(value.replace("${", r"\${"))
    if key.lstrip("+").rpartition(".")[2] not in LITERAL or value in ("", "null", "???") or value[0] in "'\"":
        return override
    value = re.sub(r"(^|(?<=,))(\w+:)?~(?=/|$)", lambda found: (found[2] or "") + os.path.expanduser("~"), value)
    if not os.path.exists(value):
        if value[0] in "[{" or re.match(r"(choice|glob|range|sort|shuffle|interval)\(", value):
            return override
        if sweep and "," in value:
            return f"{key}={','.join(map(_quoted, value.split(',')))}"
    return f"{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    """In Hydra's quotes, within which a backslash means something only before a quote and at the end."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def verb(argv: Sequence[str], usage: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """(verb, overrides) of a command line; prints `usage` and exits where it is empty. Raises UserError."""
    if not argv:
        print(usage.strip())
        sys.exit(2)
    if argv[0] not in choices:
        raise UserError(f"unknown command {argv[0]!r}; needed: one of {', '.join(choices)}")
    return argv[0], list(argv[1:])


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A UserError, OSError or config error inside becomes `error: <one line>` on stderr and exit code 2.

    Every other exception is a bug, and keeps its traceback. Of several processes one reports it.
    """
    settle_in()
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra.main then raises its errors, instead of printing them and exiting 1
    try:
        yield
        end_processes()
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            leave(error)
        if SHOW_TRACEBACK or not isinstance(error, USER_ERRORS):
            raise
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)  # above a progress bar
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped: the same command goes on with what is not finished", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(EXIT_INTERRUPTED)  # at once: the others may not answer any more
        sys.exit(EXIT_INTERRUPTED)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)


def leave(error: Exception) -> NoReturn:
    """Ends this one of several processes after an error. The first to fail says why; those that it pulled down do not.

    Without an orderly exit, which would wait for a process group that is broken.
    """
    lost = connection_lost(error)
    missing = roll_call() if lost else []
    rank = os.environ.get("RANK", "0")
    reports, code = claim_report(2 if isinstance(error, USER_ERRORS) else 1)
    if reports:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, as soon as another process has left
    if reports and lost:
        text = f"process {rank} lost the others: {one_line(error)}; not answering: {missing or 'none'}"
        print(f"error: {text}", file=sys.stderr)
    elif reports and isinstance(error, USER_ERRORS) and not SHOW_TRACEBACK:
        print(f"error: {one_line(error)}", file=sys.stderr)
    elif reports:
        print(f"process {rank} failed first:\n{''.join(traceback.format_exception(error))}", end="", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def one_line(error: BaseException) -> str:
    """An error's message as one line, without Hydra's and OmegaConf's paragraphs."""
    text = str(error) or type(error).__name__
    present = re.search(r"Could not append to config\. An item is already at '([^']+)'", text)
    if present:
        return f"+{present.group(1)} adds a key that is there already; needed: {present.group(1)}=... without the +"
    key = re.search(r"Could not (?:override|append to config\.[^']*) '([^']+)'", text)
    if key:
        return f"unknown key '{key.group(1).rstrip('.')}'{_did_you_mean(key.group(1).rstrip('.'))}"
    group = re.search(
        r"Could not find '([^']+)/([^'/]*)'\s+Available options in '[^']+':\s+(.*?)\s*Config search path",
        text, re.DOTALL,
    )  # fmt: skip
    if group:
        return f"unknown {group.group(1)}={group.group(2)}; needed: one of {', '.join(group.group(3).split())}"
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in printable(text).splitlines() if line.strip()]
    return "; ".join(lines)[:600]


def _config_files() -> Iterator[tuple[Path, set[str]]]:
    """Every file of configs/ with its dotted keys; races are no configs, and their names may have dots."""
    for path in CONFIG_DIR.rglob("*.yaml"):
        group = path.parent.relative_to(CONFIG_DIR).as_posix()
        if group == "race":
            continue
        at_root = group == "." or "# @package _global_" in path.read_text()
        where = "" if at_root else group.replace("/", ".")
        values = yaml.safe_load(path.read_text())
        if isinstance(values, dict):
            yield path, leaves(values, where).keys() - {"defaults", f"{where}.defaults"}


def _did_you_mean(key: str) -> str:
    """Where a refused key does belong (model.routes, given to model=maskdit; ckpt, given to train.py), or the keys
    nearest to a mistyped one."""
    if meant := MEANT.get(key) or MEANT.get(re.sub(r"^(train|optimizer|data)\.", "", key)):
        return f"; here it is {meant}"
    files = list(_config_files())
    groups = [(f"{path.parent.name}={path.stem}", keys) for path, keys in files if path.parent != CONFIG_DIR]
    owners = sorted(group for group, keys in groups if key in keys and not group.startswith("experiment="))
    if owners:
        return f" here; it belongs to {', '.join(owners)}"
    if others := sorted(path.stem for path, keys in files if path.parent == CONFIG_DIR and key in keys):
        return f" here; other commands have it (configs/: {', '.join(others)})"
    near = difflib.get_close_matches(key, set().union(*(keys for _, keys in files)), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else "; the keys are in configs/"


def command(main: Callable[[list[str]], int | None], usage: str) -> None:
    """Runs a script's main(arguments) -> exit code, None = 0, in a process suited to it; prints `usage` for help."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments) or arguments[:1] == ["help"]:
        print(usage.strip())
        return
    with user_errors():
        own_process()
        code = main(arguments)
    sys.exit(code)
