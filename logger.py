"""Where training's numbers go: metrics.jsonl always, wandb when asked for, and the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm


class Logger:
    """metrics.jsonl, wandb and the terminal; the main process writes, the others only take part in the mean of the loss."""

    def __init__(self, cfg: DictConfig, run_folder: Path, start_step: int, dist: PartialState):
        self.dist, self.path = dist, run_folder / "metrics.jsonl"
        self.losses, self.steps = torch.zeros((), device=dist.device), 0
        self.started, self.waited, self.paused = time.perf_counter(), 0.0, 0.0
        self.wandb = None
        if dist.is_main_process and cfg.wandb.mode != "disabled":
            import wandb

            name = cfg.run_name.replace("/", "-")
            self.wandb = wandb.init(
                mode=cfg.wandb.mode, project=cfg.wandb.project, name=name, id=name, resume="allow", dir=run_folder,
                config=OmegaConf.to_container(cfg),
            )  # fmt: skip
        self.bar = tqdm(
            total=cfg.train.max_steps, initial=start_step, unit="step", dynamic_ncols=True,
            disable=not (dist.is_main_process and sys.stderr.isatty()),
        )  # fmt: skip

    def say(self, text: str) -> None:
        if self.dist.is_main_process:
            self.bar.write(text)
            sys.stdout.flush()

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; what is waited for them counts as perf/data_wait."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, loss: torch.Tensor) -> None:
        self.losses += loss
        self.steps += 1
        self.bar.update()

    def train(self, step: int, grad_norm: torch.Tensor, lr: float, global_batch_size: int) -> None:
        """One line on the steps since the last one; the only place where training waits for the device."""
        mean = self.losses / self.steps
        if self.dist.num_processes > 1:
            torch.distributed.all_reduce(mean)
            mean /= self.dist.num_processes
        loss, norm = mean.item(), grad_norm.item()
        seconds = time.perf_counter() - self.started - self.paused
        values = {
            "train/loss": loss, "train/grad_norm": norm, "train/lr": lr, "perf/step_s": seconds / self.steps,
            "perf/img_per_s": self.steps * global_batch_size / seconds, "perf/data_wait": self.waited / seconds,
        }  # fmt: skip
        self.write(step, values)
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.losses.zero_()
        self.steps, self.started, self.waited, self.paused = 0, time.perf_counter(), 0.0, 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.dist.is_main_process:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb is not None:
            self.wandb.log({"train/step": step, **values})
        self.say(f"step {step}  " + "  ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in values.items()))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not counted as training time."""
        started = time.perf_counter()
        yield
        self.paused += time.perf_counter() - started

    def close(self, text: str) -> None:
        self.bar.close()
        self.say(text)
        if self.wandb is not None:
            self.wandb.finish()
