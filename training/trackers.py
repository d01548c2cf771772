"""Trackers, which show the numbers of metrics.jsonl under the same names: TensorBoard, wandb, trackio."""

import importlib.util
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from checkpoints.config import Settings
from checkpoints.run_folder import TRACKER_ID
from system import UserError
from system.files import write_text_atomic

Tracker = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]  # log(step, values), finish()


def tensorboard(settings: Settings, run_folder: Path, start_step: int) -> Tracker:
    """Event files in <run folder>/tensorboard. Steps that are trained again replace what was written of them."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_folder / "tensorboard", purge_step=start_step + 1)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def wandb(settings: Settings, run_folder: Path, start_step: int) -> Tracker:
    """A run at wandb, which a resume continues; WANDB_MODE=offline writes it to <run folder>/wandb alone."""
    import wandb

    name = settings.run_name.replace("/", "-")
    run = wandb.init(
        project=settings.wandb.project, name=name, id=tracker_id(run_folder), resume="allow",
        dir=run_folder, config=asdict(settings), settings=wandb.Settings(init_timeout=60),
    )  # fmt: skip
    run.define_metric("*", step_metric="train/step")  # wandb's own count takes no step twice
    return lambda step, values: run.log({"train/step": step, **values}), run.finish


def trackio(settings: Settings, run_folder: Path, start_step: int) -> Tracker:
    """A run in trackio's local database, named <run name>-<id>, which a resume continues."""
    import trackio

    name = f"{settings.run_name.replace('/', '-')}-{tracker_id(run_folder)}"
    run = trackio.init(project=settings.wandb.project, name=name, resume="allow", config=asdict(settings))
    return lambda step, values: run.log(values, step=step), run.finish


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


def check_installed(log: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in TRACKERS:
        # A folder of that name, as wandb makes one, is found too, but has no file to import.
        if name in log and getattr(importlib.util.find_spec(name), "origin", None) is None:
            raise UserError(f"log=[{','.join(log)}]: {name} is not installed; needed: pip install {name}")


def tracker_id(run_folder: Path) -> str:
    """Made at a run's first start: one that is deleted and starts anew is another curve."""
    if not (run_folder / TRACKER_ID).exists():
        write_text_atomic(run_folder / TRACKER_ID, secrets.token_hex(4) + "\n")
    return (run_folder / TRACKER_ID).read_text().strip()
