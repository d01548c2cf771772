"""Trackers, which show the numbers of metrics.jsonl under the same names: TensorBoard, wandb, trackio; the first two
show the previews, too."""

import importlib.util
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoints.config import Settings
from checkpoints.run_folder import TRACKER_ID
from system import UserError
from system.files import read_small, write_text_atomic
from system.processes import is_main

Values = dict[str, float | Path]  # numbers, and pictures by their files
Tracker = tuple[Callable[[int, Values], None], Callable[[], None]]  # log(step, values), finish()


def tensorboard(settings: Settings, run_folder: Path, start_step: int) -> Tracker:
    """Event files in <run folder>/tensorboard. Steps that are trained again replace what was written of them."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_folder / "tensorboard", purge_step=start_step + 1)

    def log(step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                writer.add_image(name, np.asarray(Image.open(value)), step, dataformats="HWC")
            else:
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

    def log(step: int, values: Values) -> None:
        shown = {name: wandb.Image(str(v)) if isinstance(v, Path) else v for name, v in values.items()}
        run.log({"train/step": step, **shown})

    return log, run.finish


def trackio(settings: Settings, run_folder: Path, start_step: int) -> Tracker:
    """A run in trackio's local database, named <run name>-<id>, which a resume continues."""
    import trackio

    name = f"{settings.run_name.replace('/', '-')}-{tracker_id(run_folder)}"
    run = trackio.init(project=settings.wandb.project, name=name, resume="allow", config=asdict(settings))

    def log(step: int, values: Values) -> None:
        run.log({name: value for name, value in values.items() if not isinstance(value, Path)}, step=step)

    return log, run.finish


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


def check_trackers(log: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed, and for wandb where nobody has logged in."""
    for name in TRACKERS:
        # A folder of that name, as wandb makes one, is found too, but has no file to import.
        if name in log and getattr(importlib.util.find_spec(name), "origin", None) is None:
            raise UserError(f"log=[{','.join(log)}]: {name} is not installed; needed: pip install {name}")
    if "wandb" in log and is_main():
        import wandb
        from requests.utils import get_netrc_auth  # wandb's own requirement

        found = wandb.setup().settings
        known = found.api_key or found.identity_token_file or get_netrc_auth(found.base_url)
        if found.mode not in ("offline", "disabled", "dryrun") and not known:
            raise UserError(
                f"log=[{','.join(log)}]: no login for {found.base_url}; needed: wandb login, or WANDB_MODE=offline"
            )


def tracker_id(run_folder: Path) -> str:
    """Made at a run's first start: one that is deleted and starts anew is another curve."""
    if not (run_folder / TRACKER_ID).exists():
        write_text_atomic(run_folder / TRACKER_ID, secrets.token_hex(4) + "\n")
    return read_small(run_folder / TRACKER_ID).decode().strip()
