"""Which checkpoint a run continues from, whether it is the same run, and what becomes of the steps after it."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from checkpoints.config import Settings, to_yaml
from checkpoints.curves import log_lines
from checkpoints.run_folder import (
    START_AGAIN,
    TRACKER_ID,
    abandon_after,
    find_checkpoint,
    latest_checkpoint,
    load_optimizer,
    load_strictly,
    newest_intact,
    read_config,
    read_tensors,
    remove_temporaries,
    step_of,
    verify_checkpoint,
)
from system import UserError
from system.files import reserve, write_text_atomic

WENT_BACK = "went_back.json"  # in checkpoints/: the last explicit resume=, and the step it started from
# Keys that may differ between a run and its continuation: none of them changes a number.
HARMLESS = (
    "run_name", "results_dir", "resume", "resume_allow", "preview", "eval", "log", "wandb", "hardware", "sampler",
    "data.path", "data.prepare", "data.source", "data.num_workers", "train.dry_run", "train.micro_batch_size",
    "train.log_every", "train.val_every", "train.val_samples", "train.save_every", "train.keep_last",
    "train.keep_every", "train.max_hours", "train.timeout_s", "train.check_replicas_every", "train.on_nonfinite",
    "train.max_skipped", "train.gradient_checkpointing", "train.deterministic",
)  # fmt: skip


def find_resume(settings: Settings, run_folder: Path) -> Path | None:
    """The verified checkpoint to resume from; None for a new run. Raises UserError."""
    if settings.resume is None:
        if (run_folder / "config.yaml").exists() or latest_checkpoint(run_folder) is not None:
            raise UserError(f"{run_folder} exists already; set resume=auto to continue it, or another run_name")
        return None
    if settings.resume == "auto":
        return newest_intact(run_folder)
    # The same command continues where it stopped; only its first start goes back.
    since = gone_back(settings.resume, run_folder)
    newest = newest_intact(run_folder) if since is not None else None
    if newest is not None and step_of(newest) > since:
        return newest
    found = find_checkpoint(settings.resume, "resume")
    verify_checkpoint(found)
    return found


def gone_back(wanted: str, run_folder: Path) -> int | None:
    """The step to which the run went back when it was last started with this very resume=; None = it was not."""
    note = run_folder / "checkpoints" / WENT_BACK
    try:
        went = json.loads(note.read_text())
        return went["step"] if went["resume"] == str(Path(wanted).absolute()) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def go_back(wanted: str | None, run_folder: Path, start_step: int) -> None:
    """Sets later checkpoints aside, deleting nothing, and notes where an explicit resume= has started."""
    if abandoned := abandon_after(run_folder, start_step):
        print(f"resume     step {start_step}; later checkpoints are in {abandoned} now")
    if wanted in (None, "auto"):
        return
    note, since = run_folder / "checkpoints" / WENT_BACK, gone_back(wanted, run_folder)
    if since is not None and start_step > since:
        again = f"to go back once more, remove {note}"
        print(f"resume     the run went back to {wanted} before, and goes on at step {start_step}; {again}")
    else:
        if abandoned:
            (run_folder / TRACKER_ID).unlink(missing_ok=True)  # the trackers begin a new curve
        note.parent.mkdir(exist_ok=True)
        write_text_atomic(note, json.dumps({"resume": str(Path(wanted).absolute()), "step": start_step}) + "\n")


def differences(saved: Settings, now: Settings, harmless: Sequence[str] = HARMLESS) -> list[str]:
    """A line for each key, but the harmless ones and those that resume_allow names, in which two runs differ."""
    allowed = (*harmless, *now.resume_allow) + (() if now.train.decay_steps else ("train.max_steps",))
    before, after = flat(asdict(saved)), flat(asdict(now))
    return [
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
        and not any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed)
    ]


def flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nested dict; tuples are lists, as in a file."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.loads(json.dumps(value))
    return found


def resume(
    path: Path, settings: Settings, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer,
    fingerprint: str,
) -> int:  # fmt: skip
    """Restores weights, averages and optimizer -> the checkpoint's step. Raises UserError where the run is another.

    modules: by file, as `saving.save` takes them. fingerprint: the data's.
    """
    differing = differences(read_config(path), settings)
    was = json.loads((path / "trainer_state.json").read_text())["data"]
    if was != fingerprint and "data" not in settings.resume_allow:
        differing.append(f"the data's fingerprint was {was}, is {fingerprint}")
    if differing:
        raise UserError(
            f"{path} is of another run: {'; '.join(differing)} (resume_allow=[key,...] continues it nevertheless)"
        )
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise UserError(f"{path} has no {file.name}; needed: a run with this average from its first step on")
        load_strictly(module, read_tensors(file), source=str(file))
    load_optimizer(path, modules["model"], optimizer)
    return step_of(path)


def reserve_run_folder(run_folder: Path, settings: Settings, start_step: int) -> TextIO:
    """Creates and locks the folder, sets aside what comes after `start_step`, and writes the resolved config.

    Closing the returned file releases the lock. Raises UserError where another job holds it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = reserve(run_folder)
    remove_temporaries(run_folder)
    (run_folder / START_AGAIN).unlink(missing_ok=True)
    go_back(settings.resume, run_folder, start_step)
    write_text_atomic(run_folder / "config.yaml", to_yaml(settings))
    metrics = run_folder / "metrics.jsonl"
    if metrics.exists():
        write_text_atomic(metrics, log_until(metrics, start_step))
    return lock


def log_until(metrics: Path, step: int) -> str:
    """The log's lines that stay at a resume: those up to the checkpoint.

    Lines that a full disk or a power cut has broken are left out, with a warning.
    """
    kept, broken = [], []
    for number, line, values in log_lines(metrics):
        if values is None:
            broken.append(number)
        elif values["step"] <= step:
            kept.append(line + "\n")
    if broken:
        numbers = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        print(f"warning: {metrics}: left out what is no log line: {numbers}", file=sys.stderr)
    return "".join(kept)
