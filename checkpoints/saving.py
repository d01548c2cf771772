"""Saving checkpoints: while training waits, or from a copy in a thread while it goes on."""

import sys
from pathlib import Path
from threading import Event, Thread

import torch
from omegaconf import DictConfig, OmegaConf

from checkpoints.run_folder import GivenUp, NamedTensors, checkpoint_tensors, prune_checkpoints, write_checkpoint
from system import cli
from training.prepare import TrainState

PAUSES_S = (1, 10)  # before a failed save is tried again: a full disk or a network file system may recover


class Saver:
    """The main process's writer of checkpoints, as train.save says.

    sync: `save` returns when the checkpoint is on disk. async: when the tensors are copied to the CPU's memory; a
    thread hashes and writes the copy, with the same writer.
    """

    def __init__(self, run_folder: Path, cfg: DictConfig, trainer_state: dict):
        self.run_folder, self.cfg, self.trainer_state = run_folder, cfg.train, trainer_state
        self.config = OmegaConf.to_yaml(cfg)
        self.step: int | None = None  # of the last save
        self.copies: NamedTensors = {}  # kept for the next save: pinned memory is slow to get
        self.thread: Thread | None = None
        self.given_up, self.error = Event(), None

    def save(self, step: int, state: TrainState, wait: bool) -> None:
        """The checkpoint of a step; a second call for the same step only waits for the first. Raises OSError.

        wait: until it is on disk. An earlier save that is still being written is then given up for this one.
        """
        if step == self.step:
            if wait:
                self.finish()
            return
        if wait:
            self.given_up.set()
            self.close()
            self.error = None  # of a save that this one replaces
            self.given_up.clear()
        self.finish()  # a save that would be overtaken
        self.step = step
        tensors = checkpoint_tensors(state.modules(), state.optimizer)
        if wait or self.cfg.save == "sync":
            self.write(step, tensors)
            return
        copied = self.copy(tensors)
        self.thread = Thread(target=self.write_copies, args=(step, copied), name=f"save of step {step}")
        self.thread.start()

    def copy(self, tensors: NamedTensors) -> torch.cuda.Event | None:
        """Tensors -> self.copies. On a GPU the host does not wait for it; the event says when it is done."""
        on_gpu = False
        for file, named in tensors.items():
            copies = self.copies.setdefault(file, {})
            for name, tensor in named.items():
                if name not in copies:
                    copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                copies[name].copy_(tensor, non_blocking=True)
                on_gpu |= tensor.is_cuda
        return torch.cuda.current_stream().record_event() if on_gpu else None

    def write_copies(self, step: int, copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            self.write(step, self.copies)
        except GivenUp:
            pass
        except Exception as error:  # for the main thread
            self.error = error

    def write(self, step: int, tensors: NamedTensors) -> None:
        for pause in (*PAUSES_S, None):
            try:
                write_checkpoint(self.run_folder, step, tensors, self.trainer_state, self.config, self.given_up)
                break
            except OSError as error:
                if pause is None:
                    raise
                reason = cli.one_line(error)
                print(f"warning: checkpoint of step {step}: {reason}; trying again in {pause} s", file=sys.stderr)
                self.given_up.wait(pause)
        prune_checkpoints(self.run_folder, self.cfg.keep_last, self.cfg.keep_every)

    def check(self) -> None:
        """Raises what failed in the thread."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """Waits for the thread, and raises what failed in it."""
        self.close()
        self.check()

    def close(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
