"""Run folders of random weights: what sampling reads, without the training."""

import torch

from checkpoints.load import build_network
from checkpoints.saving import save
from tests.conftest import settings_of


def make_run(folder, overrides, steps=(1,)):
    """A run folder with a checkpoint at each of `steps`, each of other weights; overrides as for train.py."""
    settings = settings_of([*overrides, f"run_name={folder.name}", f"train.keep_last={len(steps)}"])
    torch.manual_seed(0)
    net = build_network(settings)
    for step in steps:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save(folder, step, settings, {"model": net, "ema": net}, torch.optim.AdamW(net.parameters()), "made")
    return folder
