"""Command lines: Hydra overrides into a config, and what a user did wrong into one line on stderr with exit code 2.

Set HYDRA_FULL_ERROR=1 to see the traceback behind such a line.
"""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parent / "configs"
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)


def load_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """configs/<name>.yaml with the command line's overrides; an unknown key or group is an error."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def verb(argv: Sequence[str], usage: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """(verb, overrides) of a command line; prints `usage` and leaves when help is asked for."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage.strip())
        sys.exit(0 if argv else 2)
    if argv[0] not in choices:
        raise ValueError(f"unknown command {argv[0]!r}; needed: one of {', '.join(choices)}")
    return argv[0], list(argv[1:])


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """ValueError, OSError and config errors inside become `error: <one line>` on stderr and exit code 2."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def one_line(error: BaseException) -> str:
    """What was found and what is needed, without Hydra's and OmegaConf's paragraphs."""
    text = str(error) or type(error).__name__
    unknown = re.search(r"Could not (?:override|append to config\.).*?'([^']+)'", text) or re.search(
        r"full_key: (\S+)", text
    )
    if isinstance(error, (HydraException, OmegaConfBaseException)) and unknown and "not in" in text:
        return f"unknown key '{unknown.group(1)}'{_did_you_mean(unknown.group(1))}"
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines)[:600]


def _did_you_mean(key: str) -> str:
    """The nearest keys that the config files know, for a mistyped one."""
    known = set()
    for path in CONFIG_DIR.rglob("*.yaml"):
        group = path.parent.relative_to(CONFIG_DIR).as_posix()
        prefix = "" if group == "." else f"{group.replace('/', '.')}."
        known |= {prefix + k for k in _flat_keys(OmegaConf.load(path))}
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else "; the keys are in configs/"


def _flat_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config if isinstance(config, DictConfig) else ():
        if key in ("defaults", "hydra"):
            continue
        yield f"{prefix}{key}"
        value = config._get_node(key)
        if isinstance(value, DictConfig):
            yield from _flat_keys(value, f"{prefix}{key}.")
