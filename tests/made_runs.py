"""Run folders of random weights: what sampling reads, without the training."""

import torch
from omegaconf import OmegaConf

from checkpoints.load import instantiate
from checkpoints.run_folder import save_checkpoint
from system import cli


def make_run(folder, overrides, steps=(1,)):
    """A run folder with a checkpoint at each of `steps`, each of other weights; overrides as for train.py."""
    config = cli.load_config("config", [*overrides, f"run_name={folder.name}"])
    OmegaConf.resolve(config)
    torch.manual_seed(0)
    net = instantiate(config.model)
    for step in steps:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        optimizer = torch.optim.AdamW(net.parameters())
        save_checkpoint(
            folder,
            step,
            modules={"model": net, "ema": net},
            optimizer=optimizer,
            state={},
            config=OmegaConf.to_yaml(config),
        )
    return folder
