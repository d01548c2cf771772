"""Checkpoints are there whole or not at all, whatever happens while they are written; damage is seen."""

import errno
import json
import os
import shutil

import pytest
import torch

from checkpoints import run_folder
from checkpoints.run_folder import (
    MANIFEST,
    WEIGHTS_FILES,
    checkpoint_tensors,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    load_optimizer,
    load_strictly,
    newest_intact,
    prune_checkpoints,
    read_tensors,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from dit import DiT


@pytest.fixture(scope="module")
def trained():
    """A model, EMA and optimizer after one step."""
    torch.manual_seed(0)
    model, ema = (DiT(8, 4, 1, 16, 1, 2, num_classes=2, learn_sigma=False) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, ema, optimizer


def save(folder, step, trained):
    model, ema, optimizer = trained
    tensors = checkpoint_tensors({"model": model, "ema": ema}, optimizer)
    return write_checkpoint(folder, step, tensors, {"data": "x"}, "a: 1\n")


def load_weights(checkpoint, module, weights):
    load_strictly(module, read_tensors(checkpoint / WEIGHTS_FILES[weights]), source=str(checkpoint))


def test_round_trip(tmp_path, trained):
    model, ema, optimizer = trained
    path = save(tmp_path, 7, trained)
    verify_checkpoint(path)
    assert find_checkpoint(tmp_path) == find_checkpoint(path) == path == latest_checkpoint(tmp_path)
    torch.manual_seed(1)
    other = DiT(8, 4, 1, 16, 1, 2, num_classes=2, learn_sigma=False)
    restored = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)
    load_weights(path, other, "raw")
    load_optimizer(path, other, restored)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for field, value in optimizer.state[mine].items():
            assert torch.equal(value, restored.state[theirs][field])
    load_weights(path, other, "ema")
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), other.parameters()))
    saved = read_tensors(path / "model.safetensors")
    assert all(not key.startswith(("module.", "_orig_mod.")) for key in saved)


def test_bytes_written_are_the_state(tmp_path, trained):
    model, ema, optimizer = trained
    big = DiT(8, 4, 1, 128, 2, 2, num_classes=2, learn_sigma=False)
    opt = torch.optim.AdamW(big.parameters(), fused=True)
    for p in big.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    path = save(tmp_path, 1, (big, big, opt))
    state = 16 * sum(p.numel() for p in big.parameters())  # weights, EMA and two moments, float32
    assert sum(f.stat().st_size for f in path.iterdir()) <= 1.02 * state


WATCHED = ("fsync", "rename", "replace", "mkdir")


def crash_at(call, folder, step, trained):
    """Runs a save and a prune in a child that dies at the given file-system call; True where there was no such call."""
    child = os.fork()
    if child == 0:
        made = 0

        def dying(real):
            def wrapper(*args, **kwargs):
                nonlocal made
                made += 1
                if made == call:
                    os._exit(137)
                return real(*args, **kwargs)

            return wrapper

        for name in WATCHED:
            setattr(os, name, dying(getattr(os, name)))
        run_folder.write_safetensors = dying(run_folder.write_safetensors)
        shutil.rmtree = dying(shutil.rmtree)
        try:
            save(folder, step, trained)
            prune_checkpoints(folder, 1, None)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("again", [False, True])  # a new step; and a step once more, after a resume from the one before
def test_death_at_every_point_of_a_save_leaves_a_whole_checkpoint(tmp_path, trained, again):
    points = 0
    for call in range(1, 100):
        folder = tmp_path / str(call)
        save(folder, 1, trained)
        if again:
            save(folder, 2, trained)
        completed = crash_at(call, folder, 2, trained)
        found = newest_intact(folder)
        assert found is not None and step_of(found) in (1, 2)
        for path in complete_checkpoints(folder):
            verify_checkpoint(path)  # torn ones are never taken for complete
        save(folder, 3, trained)  # the next writer is not in the way of what is left
        assert latest_checkpoint(folder).name == "step_0000003"
        assert not list((folder / "checkpoints").glob(".tmp_*"))
        shutil.rmtree(folder)
        if completed:
            break
        points += 1
    assert points >= 15


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_seen_and_the_previous_checkpoint_taken(tmp_path, trained, harm, capsys):
    save(tmp_path, 1, trained)
    names = [path.name for path in save(tmp_path, 2, trained).iterdir()]
    assert len(names) == 6
    for name in names:
        path = save(tmp_path, 2, trained) / name
        content = path.read_bytes()
        if harm == "flip":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :])
        elif harm == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
        if name == MANIFEST and harm == "flip":
            with pytest.raises(ValueError):
                verify_checkpoint(path.parent)
        assert newest_intact(tmp_path) == tmp_path / "checkpoints" / "step_0000001", name


def test_a_full_disk_leaves_what_was_there(tmp_path, trained, monkeypatch):
    before = save(tmp_path, 1, trained)
    real = run_folder.write_safetensors
    for n in range(3):
        calls = iter(range(10))

        def full(path, tensors):
            if next(calls) == n:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            real(path, tensors)

        monkeypatch.setattr(run_folder, "write_safetensors", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, trained)
        names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
        assert [name for name in names if name.startswith((".tmp", "step"))] == [before.name]
        verify_checkpoint(before)


def test_free_space_is_looked_at_first(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match="a checkpoint needs"):
        save(tmp_path / "run", 1, trained)
    assert not (tmp_path / "run").exists()


def test_permissions_are_those_of_any_new_file(tmp_path, trained):
    before = os.umask(0o022)
    try:
        modes = {path.name: path.stat().st_mode & 0o777 for path in save(tmp_path, 1, trained).iterdir()}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o644}, modes


def test_prune_keeps_the_newest_and_the_multiples(tmp_path, trained):
    for step in range(1, 8):
        save(tmp_path, step, trained)
    prune_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert [step_of(p) for p in complete_checkpoints(tmp_path)] == [3, 6, 7]


@pytest.mark.parametrize("what", ["missing", "empty"])  # files are for foreign.py to judge
def test_what_is_no_checkpoint_is_refused_in_words(tmp_path, what):
    path = tmp_path / "x"
    if what == "empty":
        path.mkdir()
    with pytest.raises(ValueError, match=f"ckpt={path}"):
        find_checkpoint(path)


def test_weights_of_another_model_are_refused_with_the_keys(tmp_path, trained):
    path = save(tmp_path, 1, trained)
    with pytest.raises(ValueError, match="another model.*blocks.1"):
        load_weights(path, DiT(8, 4, 1, 16, 2, 2, num_classes=2, learn_sigma=False), "raw")
    with pytest.raises(ValueError, match="another model.*is .* in the file and"):
        load_weights(path, DiT(8, 4, 1, 32, 1, 2, num_classes=2, learn_sigma=False), "raw")


def test_manifest_names_every_file(tmp_path, trained):
    path = save(tmp_path, 1, trained)
    listed = set(json.loads((path / MANIFEST).read_text())["files"]) | {MANIFEST}
    assert listed == {p.name for p in path.iterdir()}
