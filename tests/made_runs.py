"""Run folders of random weights: what sampling reads, without the training."""

import torch

import conditions
from checkpoints.config import Settings, to_yaml
from checkpoints.load import build_network
from checkpoints.run_folder import CONDITIONS_FILE, checkpoint_tensors, write_checkpoint
from system import cli
from system.settings import parse


def made_settings(overrides):
    """Settings of the command line `python train.py <overrides>`."""
    return parse(Settings, cli.load_config("config", overrides))


def make_run(folder, overrides, steps=(1,), kept=None, stats=None):
    """A run folder with a checkpoint at each of `steps`, each of other weights; overrides as for train.py."""
    settings = made_settings([*overrides, f"run_name={folder.name}"])
    torch.manual_seed(0)
    net = build_network(settings)
    for step in steps:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        tensors = checkpoint_tensors({"model": net, "ema": net}, torch.optim.AdamW(net.parameters()))
        if kept is not None:
            tensors[CONDITIONS_FILE] = conditions.save(kept, stats)
        write_checkpoint(folder, step, tensors, {}, to_yaml(settings))
    return folder


def note_calls(run):
    """A list to which each row of each call of the run's network adds its multiply-adds, from now on."""
    macs, predict = [], run.predict

    def noting(x, t, condition, routing, *internal):
        macs.extend([run.model.macs(routing)] * len(x))
        return predict(x, t, condition, routing, *internal)

    run.predict = noting
    return macs
