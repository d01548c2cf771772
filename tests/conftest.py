"""Every test runs from the repository root, on few threads, without the network."""

import contextlib
import errno
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # on a free port
COMPARED = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:  # which inherits what its controller set below
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path | str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@contextlib.contextmanager
def failing_reads() -> Iterator[Callable[[str, int], None]]:
    """Yields fail(name, times): the next reads of a file fail so often, as those of a network file system do."""
    real, left = os.pread, {}

    def pread(fd: int, count: int, offset: int) -> bytes:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        if left.get(name, 0) > 0:
            left[name] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, count, offset)

    os.pread = pread
    try:
        yield lambda name, times: left.update({name: times})
    finally:
        os.pread = real


# Whole files for `pytest -m quick`: no subprocess, no compilation, no run of training.
QUICK = {
    "architecture", "conditions", "contract", "curves", "ddpm_sampler", "dit", "guidance", "idx", "maskdit",
    "objectives", "packed", "routing", "selection", "settings", "solvers", "texts",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded digits, prepared once for the whole session."""
    import data

    path = tmp_path_factory.mktemp("datasets") / "mnist"
    data.prepare("mnist", path)
    return path


def write_shard(path, arrays, labels):
    """A tar in CompVis's layout: <key>.latent.npy and <key>.cls."""
    with tarfile.open(path, "w") as tar:
        for i, (array, label) in enumerate(zip(arrays, labels)):
            key, content = f"{path.stem[-1]}{i:04d}", io.BytesIO()
            np.save(content, array)
            for name, data in ((f"{key}.latent.npy", content.getvalue()), (f"{key}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def few_latents(tmp_path_factory):
    """50 made latents of 3 classes, (1, 8, 8), in two shards of CompVis's layout: three steps of 16 make an epoch."""
    folder, rng = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    for shard, count in enumerate((30, 20)):
        labels = [i % 3 for i in range(count)]
        arrays = [((y - 1) * 0.6 + rng.normal(0, 0.1, (1, 8, 8))).astype(np.float32) for y in labels]
        write_shard(folder / f"train-{shard:06d}.tar", arrays, labels)
    return folder


@pytest.fixture(scope="session")
def tiny_overrides(few_latents):
    """Command-line keys of a run that takes a moment: 6 blocks of width 32 on 16 tokens."""
    return [
        f"data.path={few_latents}", "data.prepare=null", "data.channels=1", "data.input_size=8", "data.num_classes=3",
        "model.size=DiT-XS/2", "model.depth=6", "model.hidden_size=32", "model.num_heads=2",
        "train.global_batch_size=16", "train.max_steps=7", "train.warmup_steps=2", "train.decay_steps=0",
        "train.compile=off", "train.precision=fp32", "train.log_every=1", "train.save_every=0", "train.val_every=0",
        "train.val_samples=20", "preview.every=0", "preview.num_images=6", "sampler.num_steps=3", "train.keep_last=20",
    ]  # fmt: skip


@pytest.fixture
def run(tiny_overrides, tmp_path):
    """run(name, *overrides, stop_after=None) -> (exit code, run folder): a training run in this process."""
    import train as training
    from tests.made_runs import made_settings
    from training.stopping import PreemptionHandler

    def run(name, *overrides, stop_after=None):
        settings = made_settings([*tiny_overrides, f"results_dir={tmp_path}", f"run_name={name}", *overrides])
        with pytest.MonkeyPatch.context() as patch:
            if stop_after is not None:
                patch.setattr(PreemptionHandler, "should_stop", lambda self, step: step == stop_after)
            return training.train(settings), tmp_path / name

    return run


def loss_of(net, objective, x, condition, generators=None):
    """The loss of each row as a training step takes it: (B,)."""
    routing = net.training_routing(len(x), generators, x.device)
    return net.reduce(*objective.errors(partial(net, routing=routing), x, condition, generators), routing)


def numbers(folder):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def poison(monkeypatch, bad_step, value=float("nan")):
    """One latent of one step becomes NaN or infinity, as a corrupted sample would be."""
    import data

    make_loader = data.make_loader

    def poisoned(*args, **settings):
        for step, (raw, condition) in enumerate(make_loader(*args, **settings), settings["start_step"] + 1):
            if step == bad_step:
                raw = raw.clone()
                raw[0, 0, 0, 0] = value
            yield raw, condition

    monkeypatch.setattr(data, "make_loader", poisoned)


def assert_same_run(a, b):
    """Two run folders hold the same log and the same newest checkpoint, to the bit."""
    from checkpoints.run_folder import latest_checkpoint

    assert numbers(a) == numbers(b)
    for name in COMPARED:
        assert (latest_checkpoint(a) / name).read_bytes() == (latest_checkpoint(b) / name).read_bytes(), name
