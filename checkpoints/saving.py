"""Saving a run's checkpoints while training waits."""

import sys
import time
from pathlib import Path

import torch

import conditions
from checkpoints.config import Settings, to_yaml
from checkpoints.run_folder import CONDITIONS_FILE, checkpoint_tensors, prune_checkpoints, write_checkpoint
from conditions import Condition
from system import cli

PAUSES_S = (1, 10)  # before a failed save is tried again: a full disk or a network file system may recover


def save(
    run_folder: Path,
    step: int,
    settings: Settings,
    modules: dict[str, torch.nn.Module],  # by file: "model", "ema", and power averages
    optimizer: torch.optim.Optimizer,
    fingerprint: str,  # of the data
    kept: Condition = None,  # texts to sample and score with, without the data
) -> None:
    """Writes the checkpoint of a step and deletes what is not to be kept. Raises OSError after three attempts."""
    texts = {} if kept is None else {CONDITIONS_FILE: conditions.save(kept)}
    tensors = checkpoint_tensors(modules, optimizer) | texts
    for pause in (*PAUSES_S, None):
        try:
            write_checkpoint(run_folder, step, tensors, {"data": fingerprint}, to_yaml(settings))
            break
        except OSError as error:
            if pause is None:
                raise
            again = f"{cli.one_line(error)}; trying again in {pause} s"
            print(f"warning: checkpoint of step {step}: {again}", file=sys.stderr)
            time.sleep(pause)
    prune_checkpoints(run_folder, settings.train.keep_last, settings.train.keep_every)
