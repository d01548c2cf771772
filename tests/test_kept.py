"""Leftovers of interrupted work: parts of scores, half-deleted checkpoints; and a low limit of open files."""

import errno
import os

import numpy as np
import pytest
import torch

from checkpoints.run_folder import MANIFEST, prune_checkpoints
from data.index import refuse_low_limit
from data.latents import Latents
from evaluation.features import Features
from evaluation.score import is_whole_part, read_part, write_part
from system import UserError


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
