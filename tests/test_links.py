"""What is written follows no link, waits for no pipe, and has no name that somebody else can know before."""

import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fid
from checkpoints.gallery import reserve as begin_samples
from checkpoints.gallery import save_image
from checkpoints.load import load_run
from checkpoints.resuming import lock_run_folder
from checkpoints.run_folder import remove_temporaries, write_folder
from data.index import _cache_paths
from data.shards import open_latents
from system import UserError
from system.files import (
    atomic_file,
    check_name,
    locked,
    own,
    read_json,
    read_small,
    reserve,
    sha256_of,
    write_text_atomic,
)
from tests.made_runs import make_run


def enter(context):
    with context:
        pass


WRITERS = {
    "a lock": lambda path: enter(locked(path)),
    "a run's lock": lambda path: reserve(path.parent),
    "a log": lambda path: open(path, "a", opener=own),
    "a table": lambda path: open(path, "w", opener=own),
}


@pytest.fixture
def precious(tmp_path):
    path = tmp_path / "precious"
    path.write_text("my thesis")
    yield path
    assert path.read_text() == "my thesis"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("plant", ["link", "dangling link", "pipe", "folder"])
def test_nothing_is_opened_through_a_link_or_a_pipe(tmp_path, precious, writer, plant):
    path = tmp_path / "folder" / ".lock"
    path.parent.mkdir()
    target = {"link": precious, "dangling link": tmp_path / "new"}.get(plant)
    path.symlink_to(target) if target else os.mkfifo(path) if plant == "pipe" else path.mkdir()
    with pytest.raises((UserError, IsADirectoryError)):
        WRITERS[writer](path)
    assert not (tmp_path / "new").exists()


REPLACERS = {
    "a text": lambda path: write_text_atomic(path, "new"),
    "a picture": lambda path: save_image(np.zeros((2, 2, 3), np.uint8), path),
}


@pytest.mark.parametrize("replacer", REPLACERS)
def test_a_link_is_replaced_and_its_target_stays(tmp_path, precious, replacer):
    path = tmp_path / "x"
    path.symlink_to(precious)
    REPLACERS[replacer](path)
    assert not path.is_symlink() and path.stat().st_size


@pytest.mark.parametrize("place", ["samples", "samples/step_0000001-default", "checkpoints/step_0000002"])
def test_results_do_not_leave_the_folder_of_a_run(place, tmp_path, tiny_overrides):
    run, elsewhere = load_run(make_run(tmp_path / "run", tiny_overrides), device="cpu"), tmp_path / "elsewhere"
    (elsewhere / "link").mkdir(parents=True)
    (run.folder / "wandb").mkdir()
    (run.folder / "wandb" / "latest-run").symlink_to(elsewhere)  # as wandb makes it
    assert run.place("samples") == run.folder / "samples"
    path = run.folder / place
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(elsewhere)
    for write in (lambda: run.place("samples"), lambda: lock_run_folder(run.folder)):
        with pytest.raises(UserError, match=f"{place} is a link; needed: "):
            write()


def test_samples_do_not_leave_their_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)  # somebody's own, where no sample goes
    assert begin_samples(tmp_path / "out", {}) == {"settings": {}}
    (tmp_path / "out" / "images").symlink_to(tmp_path)
    with pytest.raises(UserError, match="images is a link"):
        begin_samples(tmp_path / "out", {})


def test_scores_of_pictures_do_not_follow_a_link_beside_them(tmp_path):
    (tmp_path / "pictures-fd").symlink_to(tmp_path)
    with pytest.raises(UserError, match="pictures-fd is a link"):
        fid.row_folder(SimpleNamespace(out=None), tmp_path, "", "pictures-fd", True)


def test_names_of_temporary_files_are_not_to_be_guessed(tmp_path):
    names = set()
    for _ in range(2):
        with atomic_file(tmp_path / "a") as file:
            names.add(file.name)
    assert len(names) == 2 and all(re.search(r"\.[0-9a-f]{16}\.tmp$", str(name)) for name in names)


@pytest.mark.parametrize("name", [".lock", "checkpoints", "metrics.jsonl", "config.yaml", "previews"])
def test_a_run_folder_with_a_link_is_refused(tmp_path, precious, tiny_overrides, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(precious)
    with pytest.raises(UserError, match=f"{name} is a link"):
        lock_run_folder(tmp_path / "run")


def test_a_linked_temporary_folder_of_a_checkpoint_goes_alone(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("x")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    planted = tmp_path / "run" / "checkpoints" / ".tmp_step_0000001"
    for act in (
        lambda: write_folder(planted.with_name("step_0000001"), {"a": {"a": torch.zeros(1)}}, {}),
        lambda: remove_temporaries(tmp_path / "run"),
    ):
        planted.symlink_to(tmp_path / "theirs")
        act()
        assert not planted.is_symlink() and os.listdir(tmp_path / "theirs") == ["x"]


@pytest.mark.parametrize("read", [read_small, read_json, sha256_of])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_files_are_read(tmp_path, read, kind):
    path = tmp_path / "x"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(UserError, match="needed: a file"):
        read(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", None, 5, ["x"], "a\0b"])
def test_names_lead_nowhere_else(name):
    with pytest.raises(UserError, match="names a file"):
        check_name(name, "manifest.json")
    assert check_name("train-000000.tar", "meta.json") == "train-000000.tar"


def test_a_downloaded_lock_which_is_a_link_is_left_alone(tmp_path, few_latents, precious, monkeypatch):
    folder = tmp_path / "latents"
    shutil.copytree(few_latents, folder, ignore=shutil.ignore_patterns(".*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lock = _cache_paths(folder, "train")[0].with_suffix(".lock")
    lock.symlink_to(precious)
    for _ in range(2):
        assert len(open_latents(folder, split="train")) == 50
    assert lock.is_symlink() and len(list((tmp_path / "cache").rglob("*.npz"))) == 1
