"""Averages of the weights: with a fixed decay, and power functions, of any width after training (EDM2, 2312.02696).

The power average of relative width s at step t gives the weights of step i the weight i^gamma: its standard deviation
is s t. Training keeps two; every save stores them, as a snapshot. A mix of snapshots approximates any other width.
Numbers of equations and algorithms are the paper's, whose times are images, not steps: only ratios matter.
"""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints.run_folder import average_files, read_tensors, snapshots_until, step_of, verify_checkpoint
from system import UserError, warn

POOR_FIT = 0.1  # error, relative to the wanted profile, from which on a reconstruction is warned of


def make_averages(model: nn.Module, widths: Sequence[float]) -> dict[str, nn.Module]:
    """The averages of a run before its first step, by file: "ema", and a power average for each width."""
    names = ["ema", *(f"power_{width}" for width in widths)]
    return {name: copy.deepcopy(model).eval().requires_grad_(False) for name in names}


@torch.no_grad()
def update_averages(
    averages: dict[str, nn.Module], model: nn.Module, step: int, ema_decay: float, ema_ramp: bool
) -> None:
    """Takes the weights of `step` into each average. ema_ramp: nears ema_decay from below while the EMA is young."""
    fixed = min(ema_decay, (1 + step) / (10 + step)) if ema_ramp else ema_decay
    for name, average in averages.items():
        update_ema(average, model, fixed if name == "ema" else beta(float(name.removeprefix("power_")), step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@cache
def gamma_of(width: float) -> float:
    """The exponent of a relative width: the largest root of Eq. 126 (Algorithm 2), which inverts Eq. 123."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def beta(width: float, step: int) -> float:
    """The part of the average of `step` that is that of the step before (Eq. 127): 0 at step 1."""
    return (1 - 1 / step) ** (gamma_of(width) + 1)


def coefficients(steps: Sequence[int], widths: Sequence[float], step: int, width: float) -> tuple[np.ndarray, float]:
    """The mix of snapshots whose profile is nearest to that of (step, width) in L2 (Algorithm 3) -> (n,), error.

    Snapshot i has steps[i], widths[i]. The coefficients' sum is 1; the error is relative to the wanted profile.
    """
    t, g = np.array(steps, dtype=np.float64), np.array([gamma_of(s) for s in widths])  # (n,)
    A = inner_product(t[:, None], g[:, None], t, g)  # (n, n)
    B = inner_product(t, g, step, gamma_of(width))  # (n,)
    X = np.linalg.solve(A, B)
    X /= X.sum()
    own = inner_product(step, gamma_of(width), step, gamma_of(width))
    return X, float(np.sqrt(max(own - 2 * X @ B + X @ A @ X, 0) / own))


def inner_product(t_a, g_a, t_b, g_b):
    """Of the profiles (t_a, gamma_a) and (t_b, gamma_b) (Eq. 151); broadcasts."""
    decay = (np.minimum(t_a, t_b) / np.maximum(t_a, t_b)) ** np.where(np.less(t_a, t_b), g_b, g_a)
    return (g_a + 1) * (g_b + 1) * decay / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


def check_reconstruction(checkpoint: Path, weights: str, width: float) -> None:
    """Raises UserError where the average of this width cannot be made at this checkpoint."""
    if weights != "ema":
        raise UserError(f"ema_width={width} is an average; needed: weights=ema, got weights={weights}")
    if checkpoint.is_file() or not average_files(checkpoint):
        raise UserError(f"ema_width={width}: {checkpoint} has no power averages; needed: a run trained with ema=power")


def reconstruct(checkpoint: Path, width: float) -> dict[str, torch.Tensor]:
    """The average of this width at a checkpoint's step; at a stored width, the stored one. Raises UserError."""
    stored = average_files(checkpoint)
    if width in stored:
        verify_checkpoint(checkpoint, only=[stored[width].name])
        return read_tensors(stored[width])
    folders = snapshots_until(checkpoint)
    files = [(step_of(folder), s, path) for folder in folders for s, path in average_files(folder).items()]
    steps, widths, paths = zip(*files)
    mix, error = coefficients(steps, widths, step_of(checkpoint), width)
    if error > POOR_FIT:
        found = f"{len(folders)} snapshots come within {error:.0%} of its profile; more saves come nearer"
        warn(f"ema_width={width}: {found}")
    for folder in folders:
        verify_checkpoint(folder, only=[path.name for path in average_files(folder).values()])
    average: dict[str, torch.Tensor] = {}
    for part, path in zip(mix, paths):
        for name, tensor in read_tensors(path).items():
            average[name] = average.get(name, 0) + part * tensor.double()
    return {name: tensor.float() for name, tensor in average.items()}
