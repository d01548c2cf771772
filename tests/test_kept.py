"""Leftovers of interrupted work: parts of scores, half-deleted checkpoints, objects that a compiler was killed at; data
that changed meanwhile; and a low limit of open files."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from checkpoints.run_folder import MANIFEST, prune_checkpoints
from data import loader, open_latents
from data.index import refuse_low_limit
from data.latents import Latents
from evaluation.evaluate import is_whole_part, read_part, write_part
from evaluation.features import Features
from system import UserError, compiling
from tests.conftest import ROOT, write_shard


@pytest.mark.parametrize(
    ("keep_every", "left"), [(None, [30, 40]), (10, [10, 30, 40])], ids=["all go", "one of keep_every stays"]
)
def test_leftovers_of_a_killed_deletion_go_where_newer_checkpoints_are_kept(tmp_path, keep_every, left):
    for step in (5, 10, 30, 40):
        folder = tmp_path / "checkpoints" / f"step_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"kept")
        if step == 30:
            (folder / MANIFEST).write_text("{}")
    prune_checkpoints(tmp_path, 1, keep_every)
    assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir()) == left


def test_nothing_goes_where_no_checkpoint_is_whole(tmp_path):
    (folder := tmp_path / "checkpoints" / "step_0000005").mkdir(parents=True)
    prune_checkpoints(tmp_path, 1, None)
    assert folder.is_dir()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-40] + bytes([b[-40] ^ 0x44]) + b[-39:], lambda b: b[:-1]],
    ids=["cut", "empty", "a flipped bit", "a byte short"],
)
def test_damaged_parts_of_a_scoring_are_made_again(tmp_path, damage):
    rows = torch.arange(40.0).view(4, 10)  # (B, D)
    write_part(path := tmp_path / "0.safetensors", Features(rows, None, None))
    assert is_whole_part(path) and torch.equal(read_part(path, torch.device("cpu")).pool, rows)
    path.write_bytes(damage(path.read_bytes()))
    assert not is_whole_part(path)


def test_a_low_limit_of_open_files_closes_others_and_is_no_damage(tmp_path, monkeypatch):
    for shard in "abc":
        (tmp_path / shard).write_bytes(shard.encode())
    latents = object.__new__(Latents)
    latents.folder, latents._files = tmp_path, {}
    latents._index = type("Shards", (), {"shards": ["a", "b", "c"]})
    usual = os.open

    def open_two(path, flags):
        if len(latents._files) >= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return usual(path, flags)

    monkeypatch.setattr(os, "open", open_two)
    read = [os.pread(latents._file(shard), 1, 0) for shard in np.array([0, 1, 2, 0, 1])]
    assert read == [b"a", b"b", b"c", b"a", b"b"]
    refuse_low_limit(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(UserError, match="ulimit -n"):
        refuse_low_limit(OSError(errno.EMFILE, "Too many open files"))


def test_another_validation_set_is_refused_at_the_resume(run, few_latents, tmp_path):
    shutil.copytree(few_latents, folder := tmp_path / "data")

    def validate_on(seed):
        arrays = np.random.default_rng(seed).normal(size=(6, 1, 8, 8)).astype(np.float32)
        write_shard(folder / "val-000000.tar", arrays, [0, 1, 2] * 2)

    validate_on(0)
    assert run("kept", f"data.path={folder}", "train.max_steps=2")[0] == 0
    validate_on(1)
    with pytest.raises(UserError, match="the validation's fingerprint was .*resume_allow"):
        run("kept", f"data.path={folder}", "train.max_steps=3")
    allowed = "resume_allow=[validation,train.max_steps]"
    assert run("kept", f"data.path={folder}", "train.max_steps=3", allowed)[0] == 0


def test_objects_that_a_killed_compiler_left_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "LINKED_S", 0.2)
    header = b"\x7fELF".ljust(40, b"\1") + (100).to_bytes(8, "little") + bytes(10) + bytes([64, 0, 3, 0, 2, 0])
    whole = header + bytes(100 + 3 * 64 - len(header))  # its table of sections comes last, as linkers write it
    left = {"cut": whole[:-1], "half": whole[:150], "header": whole[:20], "empty": b"", "zeros": bytes(99)}
    for name, content in {"whole": whole, **left}.items():
        (folder := tmp_path / name).mkdir()
        (folder / "kernel.so").write_bytes(content)
    started = time.monotonic()
    compiling.remove_cut_objects(tmp_path)
    assert time.monotonic() - started >= 0.2  # another process may have been at work
    assert [path.parent.name for path in tmp_path.glob("*/*.so")] == ["whole"]


COMPILE = (
    "import torch\nfrom dit import DiT\nfrom system.compiling import compile_blocks, decide_compile\n"
    "net = DiT(input_size=8, in_channels=1, num_classes=3, size='DiT-XS/2', depth=2, hidden_size=32, num_heads=2)\n"
    "decided, why = decide_compile('blocks', torch.device('cpu'))\nassert not why, why\n"
    "compile_blocks(net.all_blocks, decided)\n"
    "net(torch.ones(2, 1, 8, 8), torch.ones(2), torch.zeros(2, dtype=torch.int64)).sum().backward()\n"
)


@pytest.mark.slow
def test_killed_at_ten_moments_of_a_compilation_the_next_run_works(tmp_path):
    def start(cache):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", COMPILE], env=environment, start_new_session=True)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    takes, moments = time.monotonic() - began, random.Random(0)
    for i in range(10):
        process = start(cache := tmp_path / str(i))
        time.sleep(takes * moments.uniform(0.1, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert start(cache).wait() == 0


def test_a_loader_process_without_shared_memory_is_one_line(few_latents, monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "SHARED", str(tmp_path))
    monkeypatch.setattr(loader, "ROOM_S", 0.3)
    usage = iter([(100, 90, 10)] * 2 + [(100, 10, 90)])
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(*next(usage)))
    loader.wait_for_room(50)  # the third look finds room
    usage = iter([(100, 90, 10)] * 99)
    for needed in (50, 200):  # never free; never there
        with pytest.raises(UserError, match="data.num_workers=0, or more .docker run --shm-size"):
            loader.wait_for_room(needed)
    monkeypatch.setattr(loader, "wait_for_room", lambda needed: (_ for _ in ()).throw(UserError(f"no room: {needed}")))
    plan = loader.BatchPlan(16, 16, 1, 0, 1)
    batches = loader.make_loader(open_latents(few_latents), plan, num_steps=3, num_workers=1)
    with pytest.raises(UserError, match=f"no room: {16 * 64 * 4 + 16 * 8}"):
        next(iter(batches))
