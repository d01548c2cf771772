"""Mean and standard deviation of a data set's channels as the model sees them, and a word when they look wrong."""

import numpy as np
import torch

from data.latents import Latents
from randomness import seeded_generator

MAX_SAMPLES = 4096  # spread evenly over the set; enough for three digits
UNUSUAL = 2.5  # SD latents are at 0.9 when scaled, 5 when not, 0.17 when scaled twice


def channel_stats(latents: Latents, max_samples: int = MAX_SAMPLES) -> tuple[list[float], list[float]]:
    """Mean and std (C,) of the model's input over at most `max_samples` samples."""
    chosen = np.unique(np.linspace(0, len(latents) - 1, max_samples).astype(np.int64))
    generator = seeded_generator("channel_stats")
    total = torch.zeros(2, latents.shape[0], dtype=torch.float64)  # sums of x and x^2
    for indices in np.array_split(chosen, -(-len(chosen) // 256)):
        x = latents.to_model_input(latents.read(indices)[0], generator).double()  # (B, C, h, w)
        total += torch.stack([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))])
    mean, square = total / (len(chosen) * latents.shape[1] * latents.shape[2])
    std = (square - mean.square()).clamp(min=0).sqrt()
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def scale_warning(latents: Latents, sigma_data: float) -> str | None:
    """A line for the start of training where the latents' std is far from what the objective is set up for, else None.

    sigma_data: the objective's (EDM: edm.sigma_data; a flow to N(0, 1): 1).
    """
    mean, std = channel_stats(latents, 256)
    overall = float(np.sqrt(np.mean(np.square(std) + np.square(mean)) - np.mean(mean) ** 2))
    if sigma_data / UNUSUAL <= overall <= sigma_data * UNUSUAL:
        return None
    return (
        f"the latents in {latents.folder} have standard deviation {overall:.3g} where the objective expects about "
        f"{sigma_data:.3g}: is their scale right? (python -m data inspect {latents.folder})"
    )
