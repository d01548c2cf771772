"""The cost of sparse against classifier-free guidance, counted and measured: `python scripts/guidance_cost.py`.

One guided prediction of a network with random weights; both methods alternate, and times are medians. Classifier-free
guidance runs both branches in one batch, sparse guidance in two. Keys: configs/guidance_cost.yaml.
"""

import statistics
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from checkpoints.load import round_linears
from dit import DiT
from guidance import Guidance
from rf import RectifiedFlow
from system import cli
from system.launchers import own_process
from system.processes import start_processes


def main(overrides: list[str]) -> None:
    if set(overrides) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    config = cli.load_config("guidance_cost", overrides)
    methods = {
        "classifier-free": Guidance(1.5),
        "sparse": Guidance(1.5, None, config.gamma_strong, config.gamma_weak, "same"),
    }
    route = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -4}
    net = DiT(size=config.size, routes=[route])
    if config.precision == "bf16":
        round_linears(net)
    device = start_processes().device
    run = sample.Run(net.to(device).eval(), RectifiedFlow(), None, OmegaConf.create(), device, config.precision)
    seeds = range(config.batch_size)
    labels, seconds, macs = sample.labels_for(1000, seeds, "random"), {name: [] for name in methods}, {}
    for repeat in range(config.repeats + 1):
        for name, guidance in methods.items():
            started = time.perf_counter()
            sample.generate_latents(
                run, guidance, seeds, labels, {"num_steps": 1}
            ).sum().item()  # .item() waits for the device
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
            macs[name] = run.macs
    for name in methods:
        print(f"{name:16} {macs[name] / 1e9:7.2f} GMACs an image, {statistics.median(seconds[name]):.3f} s a batch")
    counted = macs["sparse"] / macs["classifier-free"]
    measured = statistics.median(a / b for a, b in zip(seconds["sparse"], seconds["classifier-free"]))
    where = f"{config.size}, batch {config.batch_size}, {config.precision}, {device.type}"
    print(f"sparse / classifier-free: counted {counted:.3f}, measured {measured:.3f} ({where})")


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])
