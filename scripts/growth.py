"""How a training step grows with tokens, width, depth, batch and routing: `python scripts/growth.py [OUT.png]`.

Multiply-adds by formula, and the memory of a step beyond its state, as cost.py counts it: around DiT-B/2 in bf16, on
256 tokens, at micro-batch 32, with one quantity changed at a time. Prints the slopes on logarithmic axes, and draws
them.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost import step_memory
from routing_module import Routing
from system import cli
from system.instantiate import instantiate

BATCH = 32
VARIED = {  # quantity: (its values, the overrides that set one)
    "tokens": ([64, 256, 1024, 4096], lambda n: [f"data.input_size={2 * math.isqrt(n)}"]),
    "width": ([384, 768, 1152, 1536], lambda d: [f"model.hidden_size={d}", f"model.num_heads={d // 64}"]),
    "depth": ([8, 12, 24, 48], lambda n: [f"model.depth={n}"]),
    "micro-batch": ([8, 16, 32, 64], lambda n: [f"train.global_batch_size={n}"]),
    "share of tokens kept": (
        [0.25, 0.5, 0.75, 1.0],
        lambda kept: [f"model.routes=[{{selection_ratio:{1 - kept},start_layer_idx:2,end_layer_idx:-4}}]"],
    ),
}


def costs(overrides: list[str]) -> tuple[float, float]:
    """(multiply-adds of a step's forward passes, bytes of a step beyond the state), routed."""
    base = ["data=imagenet256", "model=tread", "model.size=DiT-B/2", "train.precision=bf16"]
    cfg = cli.load_config("config", [*base, f"train.global_batch_size={BATCH}", *overrides])
    with torch.device("meta"):
        model = instantiate(cfg.model)
    memory, batch = step_memory(cfg, device="cuda"), cfg.train.global_batch_size
    return batch * model.macs(Routing()), memory.peak(batch) - memory.state


def main(out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, what in ((left, "multiply-adds of a step"), (right, "memory of a step beyond its state")):
        axes.set(xscale="log", yscale="log", xlabel="quantity, relative to the smallest", title=f"{what}, relative")
        axes.grid(alpha=0.3)
    print("| quantity | values | slope of multiply-adds | slope of memory |\n|---|---|---|---|")
    for name, (values, overrides) in VARIED.items():
        grown = np.array([costs(overrides(value)) for value in values])  # (values, 2)
        x, (work, memory) = np.array(values) / values[0], (grown / grown[0]).T
        slopes = [np.polyfit(np.log(x), np.log(y), 1)[0] for y in (work, memory)]
        print(f"| {name} | {', '.join(map(str, values))} | {slopes[0]:.2f} | {slopes[1]:.2f} |")
        for axes, y, slope in ((left, work, slopes[0]), (right, memory, slopes[1])):
            axes.plot(x, y, marker="o", label=f"{name}: {slope:.2f}")
            axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    with cli.user_errors():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/growth.png"))
