"""Which checkpoint a run continues from, whether it is the same run, and what becomes of the steps after it."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from checkpoints import run_folder as folders
from checkpoints.config import Settings, to_yaml
from checkpoints.curves import log_lines
from checkpoints.run_folder import newest_intact, step_of
from contracts import Network, Objective
from system import UserError, warn
from system.building import class_of
from system.files import check_no_links, read_json, reserve, write_text_atomic
from system.settings import Count, convert, leaves, parse_known

WENT_BACK = "checkpoints/went_back.json"  # {the last explicit resume=: the step that it started from}
# Keys that may differ between a run and its continuation: none of them changes a number.
HARMLESS = (
    "run_name", "results_dir", "resume", "resume_allow", "preview", "eval", "log", "wandb", "hardware", "sampler",
    "data.path", "data.prepare", "data.source", "data.num_workers", "data.codec", "data.usual_codec", "train.dry_run",
    "train.micro_batch_size", "train.log_every", "train.val_every", "train.val_samples", "train.save_every",
    "train.keep_last", "train.keep_every", "train.max_hours", "train.timeout_s", "train.check_replicas_every",
    "train.on_nonfinite", "train.max_skipped", "train.gradient_checkpointing", "train.deterministic",
)  # fmt: skip


def find_resume(settings: Settings, run_folder: Path) -> Path | None:
    """The verified checkpoint to resume from; None for a new run. Raises UserError."""
    if settings.resume is None:
        if (run_folder / "config.yaml").exists() or folders.latest_checkpoint(run_folder) is not None:
            raise UserError(f"{run_folder} exists already; set resume=auto to continue it, or another run_name")
        return None
    if settings.resume == "auto":
        return newest_intact(run_folder)
    # The same command continues where it stopped; only its first start goes back.
    since = gone_back(settings.resume, run_folder)
    newest = newest_intact(run_folder) if since is not None else None
    if newest is not None and step_of(newest) > since:
        return newest
    found = folders.find_checkpoint(settings.resume, "resume")
    folders.verify_checkpoint(found)
    return found


def gone_back(wanted: str, run_folder: Path) -> int | None:
    """The step to which the run went back when it was last started with this very resume=; None = it was not."""
    note = run_folder / WENT_BACK
    noted = read_json(note) if note.is_file() else {}
    return convert(noted.get(str(Path(wanted).absolute())), Count | None, str(note))


def go_back(wanted: str | None, run_folder: Path, start_step: int) -> None:
    """Sets later checkpoints aside, deleting nothing, and notes where an explicit resume= has started."""
    if abandoned := folders.abandon_after(run_folder, start_step):
        print(f"resume     step {start_step}; later checkpoints are in {abandoned} now")
    if wanted in (None, "auto"):
        return
    note, since = run_folder / WENT_BACK, gone_back(wanted, run_folder)
    if since is not None and start_step > since:
        again = f"to go back once more, remove {note}"
        print(f"resume     the run went back to {wanted} before, and goes on at step {start_step}; {again}")
        return
    if abandoned:
        (run_folder / folders.TRACKER_ID).unlink(missing_ok=True)  # the trackers begin a new curve
    note.parent.mkdir(exist_ok=True)
    write_text_atomic(note, json.dumps({str(Path(wanted).absolute()): start_step}) + "\n")


def differences(saved: Settings, now: Settings, harmless: Sequence[str] = HARMLESS) -> list[str]:
    """A line for each key, but the harmless ones and those that resume_allow names, in which two runs differ."""
    by_end = now.train.decay_steps or now.train.dense_last  # what the last step decides
    allowed = [*harmless, *now.resume_allow, *([] if by_end else ["train.max_steps"])]
    prefixes, before, after = tuple(f"{key}." for key in allowed), flat(completed(saved)), flat(completed(now))
    keys = [key for key in before | after if before.get(key) != after.get(key) and not f"{key}.".startswith(prefixes)]
    return [f"{key} was {before.get(key)}, is {after.get(key)}" for key in keys]


def completed(settings: Settings) -> Settings:
    """With the defaults of what model and objective do not say, such as keys that are newer than a checkpoint."""
    parts = {}
    for key, base in (("model", Network), ("objective", Objective)):
        section = getattr(settings, key)
        parameters = inspect.signature(class_of(section["_target_"], base, key)).parameters.values()
        parts[key] = {p.name: p.default for p in parameters if p.default is not p.empty} | section
    return replace(settings, **parts)


def flat(settings: Settings) -> dict[str, Any]:
    """{dotted key: value}; tuples are lists, as in a file."""
    return leaves(json.loads(json.dumps(asdict(settings))))


def resume(
    path: Path, settings: Settings, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer,
    fingerprints: dict[str, str],
) -> int:  # fmt: skip
    """Restores weights, averages and optimizer -> the checkpoint's step. Raises UserError where the run is another.

    modules: by file, as `run_folder.save` takes them, and fingerprints of the data.
    """
    differing = differences(folders.read_config(path), settings)
    state = path / "trainer_state.json"
    before = parse_known(folders.TrainerState, read_json(state), state)
    for name, was in (("data", before.data), ("validation", before.validation)):
        if was not in (None, fingerprints[name]) and name not in settings.resume_allow:
            differing.append(f"the {name}'s fingerprint was {was}, is {fingerprints[name]}")
    if differing:
        cure = "needed: another run_name= for a new run, or resume_allow=[key,...] to continue this one nevertheless"
        raise UserError(f"{path} is of another run: {'; '.join(differing)}; {cure}")
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise UserError(f"{path} has no {file.name}; needed: a run that has had it from its first step on")
        folders.load_strictly(module, folders.read_tensors(file), source=str(file))
    folders.load_optimizer(path, modules["model"], optimizer, modules.get("projector"))
    return step_of(path)


def lock_run_folder(run_folder: Path) -> TextIO:
    """Locks a run's folder, before a checkpoint is chosen: a job that still saves would save newer ones meanwhile.

    Closing the returned file releases the lock. Raises UserError where another job holds it.
    """
    check_no_links(run_folder)
    return reserve(run_folder)


def begin(run_folder: Path, settings: Settings, start_step: int) -> None:
    """In a locked folder: sets aside what comes after `start_step`, and writes the resolved config."""
    folders.remove_temporaries(run_folder)
    (run_folder / folders.START_AGAIN).unlink(missing_ok=True)
    go_back(settings.resume, run_folder, start_step)
    write_text_atomic(run_folder / "config.yaml", to_yaml(settings))
    if (metrics := run_folder / "metrics.jsonl").exists():
        cut_log(metrics, start_step)


def cut_log(metrics: Path, step: int) -> None:
    """Leaves the lines up to a step. Those that a full disk or a power cut has broken go with a warning."""
    lines = list(log_lines(metrics))
    if broken := [str(number) for number, _, values in lines if values is None]:
        numbers = ", ".join(broken[:10] + ["..."] * (len(broken) > 10))
        warn(f"{metrics}: left out what is no log line: {numbers}")
    kept = (line + "\n" for _, line, values in lines if values is not None and values["step"] <= step)
    write_text_atomic(metrics, "".join(kept))
