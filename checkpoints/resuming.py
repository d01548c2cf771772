"""Which checkpoint a run continues from, whether it is the same run, and what becomes of the steps after it."""

import json
import sys
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf

import data
from checkpoints.run_folder import (
    abandon_after,
    average_name,
    find_checkpoint,
    latest_checkpoint,
    load_optimizer,
    load_strictly,
    load_weights,
    newest_intact,
    read_config,
    read_tensors,
    remove_temporaries,
    step_of,
    verify_checkpoint,
)
from system import UserError, cli
from system.files import reserve, write_text_atomic
from system.processes import is_main
from training.curves import log_lines
from training.prepare import TrainState
from training.stopping import START_AGAIN
from training.trackers import start_new_curve

WENT_BACK = "went_back.json"  # in checkpoints/: the last explicit resume=, and the step it started from


def find_resume(cfg: DictConfig, run_folder: Path) -> Path | None:
    """The verified checkpoint to resume from; None for a new run. Raises UserError."""
    if cfg.resume is None:
        if (run_folder / "config.yaml").exists() or latest_checkpoint(run_folder) is not None:
            raise UserError(f"{run_folder} exists already; set resume=auto to continue it, or another run_name")
        return None
    if cfg.resume == "auto":
        return newest_intact(run_folder)
    # The same command continues where it stopped; only its first start goes back.
    since = gone_back(cfg, run_folder)
    newest = newest_intact(run_folder) if since is not None else None
    if newest is not None and step_of(newest) > since:
        return newest
    found = find_checkpoint(cfg.resume, "resume")
    verify_checkpoint(found)
    return found


def gone_back(cfg: DictConfig, run_folder: Path) -> int | None:
    """The step to which the run went back when it was last started with this very resume=; None = it was not."""
    note = run_folder / "checkpoints" / WENT_BACK
    try:
        went = json.loads(note.read_text())
        return went["step"] if went["resume"] == str(Path(cfg.resume).absolute()) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def go_back(cfg: DictConfig, run_folder: Path, start_step: int) -> None:
    """Sets later checkpoints aside, deleting nothing, and notes where an explicit resume= has started."""
    if abandoned := abandon_after(run_folder, start_step):
        print(f"resume     step {start_step}; later checkpoints are in {abandoned} now")
    if cfg.resume in (None, "auto"):
        return
    note, since = run_folder / "checkpoints" / WENT_BACK, gone_back(cfg, run_folder)
    if since is not None and start_step > since:
        again = f"to go back once more, remove {note}"
        print(f"resume     the run went back to {cfg.resume} before, and goes on at step {start_step}; {again}")
    else:
        if abandoned:
            start_new_curve(run_folder)
        note.parent.mkdir(exist_ok=True)
        write_text_atomic(note, json.dumps({"resume": str(Path(cfg.resume).absolute()), "step": start_step}) + "\n")


# Keys that may differ between a run and its continuation: none of them changes a number.
HARMLESS = (
    "run_name", "results_dir", "resume", "resume_allow", "preview", "eval", "log", "wandb", "hardware", "sampler",
    "data.path", "data.prepare", "data.source", "data.num_workers", "train.dry_run", "train.micro_batch_size",
    "train.log_every", "train.val_every", "train.val_samples", "train.save_every", "train.save", "train.keep_last",
    "train.keep_every", "train.max_hours", "train.timeout_s", "train.check_replicas_every", "train.on_nonfinite",
    "train.max_skipped", "train.gradient_checkpointing", "train.deterministic",
)  # fmt: skip


def resume(path: Path, state: TrainState, cfg: DictConfig, latents: data.Latents) -> int:
    """Restores weights, EMA and optimizer -> the checkpoint's step. Raises UserError where the run is another."""
    saved = read_config(path)
    allowed = (*HARMLESS, *cfg.resume_allow) + (() if cfg.train.decay_steps else ("train.max_steps",))
    known, differing, newer = set(cli.flat_keys(saved)), [], []
    for key in dict.fromkeys([*known, *cli.flat_keys(cfg)]):
        was, now = OmegaConf.select(saved, key), OmegaConf.select(cfg, key)
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed) or key in known and was == now:
            continue
        if key in known:
            differing.append(f"{key} was {was}, is {now}")
        elif now in (defaults := cli.defaults_of(key)):
            newer.append(f"{key}={now}")
        else:
            differing.append(f"{key} is newer than the checkpoint, which had {defaults}, is {now}")
    fingerprint = json.loads((path / "trainer_state.json").read_text())["data"]
    if fingerprint != latents.fingerprint and "data" not in cfg.resume_allow:
        differing.append(f"the data's fingerprint was {fingerprint}, is {latents.fingerprint}")
    if differing:
        raise UserError(
            f"{path} is of another run: {'; '.join(differing)} (resume_allow=[key,...] continues it nevertheless)"
        )
    if newer and is_main():
        print(f"resume     the checkpoint is older than {', '.join(newer)}: the defaults, as it was trained")
    load_weights(path, state.model, "raw")
    load_weights(path, state.ema, "ema")
    for width, average in state.power.items():
        file = path / f"{average_name(width)}.safetensors"
        if not file.is_file():
            raise UserError(f"{path} has no power average of width {width}; needed: a run with it from its first step")
        load_strictly(average, read_tensors(file), source=str(file))
    load_optimizer(path, state.model, state.optimizer)
    return step_of(path)


def reserve_run_folder(run_folder: Path, cfg: DictConfig, start_step: int) -> TextIO:
    """Creates and locks the folder, sets aside what comes after `start_step`, and writes the resolved config.

    Closing the returned file releases the lock. Raises UserError where another job holds it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = reserve(run_folder)
    remove_temporaries(run_folder)
    (run_folder / START_AGAIN).unlink(missing_ok=True)
    go_back(cfg, run_folder, start_step)
    write_text_atomic(run_folder / "config.yaml", OmegaConf.to_yaml(cfg))
    metrics = run_folder / "metrics.jsonl"
    if metrics.exists():
        write_text_atomic(metrics, log_until(metrics, start_step))
    return lock


def log_until(metrics: Path, step: int) -> str:
    """The log's lines that stay at a resume: those up to the checkpoint, but not its evaluations, which run again.

    Lines that a full disk or a power cut has broken are left out, with a warning.
    """
    kept, broken = [], []
    for number, line, values in log_lines(metrics):
        if values is None:
            broken.append(number)
        elif values["step"] < step or (values["step"] == step and "train/loss" in values):
            kept.append(line + "\n")
    if broken:
        numbers = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        print(f"warning: {metrics}: left out what is no log line: {numbers}", file=sys.stderr)
    return "".join(kept)
