"""log=[jsonl,...]: the same numbers everywhere, curves that a resume continues, and none that two runs share."""

import importlib.machinery
import importlib.util
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from system import UserError
from tests.conftest import numbers
from training.trackers import check_trackers


class MadeTracker:
    """wandb or trackio without its server: `curves` is {id or name: [values]}, `inits` what init was given."""

    Settings = staticmethod(dict)
    Image = staticmethod(Path)
    account = SimpleNamespace(mode="disabled", api_key=None, identity_token_file=None, base_url="https://wandb.test")

    def setup(self):
        return SimpleNamespace(settings=self.account)

    def __init__(self, name, fails=None):
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None, origin="made")
        self.curves, self.inits, self.fails = {}, [], fails

    def init(self, **settings):
        if self.fails == "init":
            raise ConnectionError("no route to host")
        self.inits.append(settings)
        self.curve = self.curves.setdefault(settings.get("id", settings["name"]), [])
        return self

    def define_metric(self, *args, **settings):
        pass

    def log(self, values, step=None):
        if self.fails:
            raise ConnectionError("no route to host")
        self.curve.append({"train/step": step, **values})

    def finish(self):
        if self.fails:
            raise ConnectionError("no route to host")


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    made = MadeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    made.log_key = f"log=[jsonl,{request.param}]"
    return made


def logged(folder):
    """metrics.jsonl as trackers are given it."""
    return [
        {"train/step" if name == "step" else name: value for name, value in json.loads(line).items()}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_resume_continues_the_curve_and_a_restart_or_another_branch_has_its_own(run, tracker):
    keys = [tracker.log_key, "train.save_every=2", "train.val_every=2"]
    _, folder = run("a", *keys, stop_after=4)
    assert run("a", *keys)[0] == 0
    (first,) = tracker.curves
    assert sorted({line["train/step"] for line in tracker.curves[first]}) == [1, 2, 3, 4, 5, 6, 7]
    assert all(line in tracker.curves[first] for line in logged(folder))

    back = folder / "checkpoints" / "step_0000002"
    assert run("a", *keys, f"resume={back}", "train.lr=1e-3", "resume_allow=[train.lr]")[0] == 0
    assert run("a", *keys, f"resume={back}", "train.lr=1e-3", "resume_allow=[train.lr]")[0] == 0
    _, branch = tracker.curves
    assert [line["train/step"] for line in tracker.curves[branch] if "train/loss" in line] == [3, 4, 5, 6, 7]

    shutil.rmtree(folder)
    run("a", *keys)
    assert len(tracker.curves) == 3 and all(settings["resume"] == "allow" for settings in tracker.inits)


def test_tensorboard_has_the_log_and_each_step_once(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = ["log=[jsonl,tensorboard]", "train.val_every=2"]
    _, folder = run("a", *keys, "train.save_every=4")
    shutil.rmtree(folder / "checkpoints" / "step_0000007")  # killed after step 7, whose lines are there
    assert run("a", *keys)[0] == 0
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    lines = logged(folder)
    assert set(events.Tags()["scalars"]) == {name for line in lines for name in line} - {"train/step"}
    for name in events.Tags()["scalars"]:
        found = {event.step: event.value for event in events.Scalars(name)}
        wanted = {line["train/step"]: line[name] for line in lines if name in line}
        assert found == pytest.approx(wanted, rel=1e-6), name
        assert len(events.Scalars(name)) == len(found)


def test_previews_are_shown(run, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "wandb", made := MadeTracker("wandb"))
    monkeypatch.setitem(sys.modules, "trackio", numbers_only := MadeTracker("trackio"))
    keys = ["log=[jsonl,wandb,tensorboard,trackio]", "preview.every=4", "train.save_every=4"]
    _, folder = run("a", *keys, stop_after=4)
    assert run("a", *keys)[0] == 0  # which draws what was due after step 4
    files = {step: folder / "samples" / f"step_{step:07d}.png" for step in (4, 7)}
    (curve,), (plain,) = made.curves.values(), numbers_only.curves.values()
    assert [line["preview"] for line in curve if "preview" in line] == list(files.values())
    assert not any("preview" in line for line in plain)
    shown = EventAccumulator(str(folder / "tensorboard")).Reload().Images("preview")
    for image in shown:
        pixels = Image.open(io.BytesIO(image.encoded_image_string)), Image.open(files[image.step])
        assert (np.asarray(pixels[0]) == np.asarray(pixels[1])).all()
    assert [image.step for image in shown] == [4, 7]


def test_wandb_without_a_login_is_refused_before_anything_is_made(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", made := MadeTracker("wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    made.account = SimpleNamespace(**{**vars(made.account), "mode": "online"})
    with pytest.raises(UserError, match="no login for https://wandb.test; needed: wandb login, or WANDB_MODE=offline"):
        run("a", "log=[jsonl,wandb]")
    assert not (tmp_path / "a").exists()
    (tmp_path / "netrc").write_text("machine wandb.test login user password key\n")
    check_trackers(["wandb"])
    (tmp_path / "netrc").unlink()
    made.account.api_key = "key"
    check_trackers(["wandb"])


@pytest.mark.parametrize("fails, warnings", [("init", 1), ("log", 2)])
def test_without_its_server_a_tracker_costs_a_warning(run, monkeypatch, capsys, fails, warnings):
    monkeypatch.setitem(sys.modules, "wandb", MadeTracker("wandb", fails))
    code, folder = run("away", "log=[jsonl,wandb]")
    assert code == 0 and len(numbers(folder)) == 7
    assert capsys.readouterr().err.count("no route to host") == warnings


def test_wandb_offline_needs_no_account(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, folder = run("offline", "log=[jsonl,wandb]", "train.max_steps=2")
    assert code == 0 and list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(run, tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()  # a folder of its name is no package
    there = partial(importlib.machinery.PathFinder.find_spec, path=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", there)
    with pytest.raises(UserError, match=r"log=\[jsonl,trackio\]: trackio is not installed; needed: pip"):
        run("a", "log=[jsonl,trackio]")
    assert not (tmp_path / "a").exists()
    check_trackers(["jsonl"])
