"""The training loop: what it learns from, exact resume, faults; one process here, two in test_processes.py."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import train as training
from checkpoints.run_folder import latest_checkpoint, read_tensors
from system import cli
from tests.conftest import ROOT, write_shard
from training.guard import FiniteGuard
from training.stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN, PreemptionHandler

COMPARED = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture
def run(tiny_overrides, tmp_path):
    """run(name, *overrides, stop_after=None) -> (exit code, run folder)."""

    def run(name, *overrides, stop_after=None):
        config = cli.load_config("config", [*tiny_overrides, f"results_dir={tmp_path}", f"run_name={name}", *overrides])
        with pytest.MonkeyPatch.context() as patch:
            if stop_after is not None:
                patch.setattr(PreemptionHandler, "should_stop", lambda self, step: step == stop_after)
            return training.train(config), tmp_path / name

    return run


def numbers(folder):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def assert_same_run(a, b):
    assert numbers(a) == numbers(b)
    for name in COMPARED:
        assert (latest_checkpoint(a) / name).read_bytes() == (latest_checkpoint(b) / name).read_bytes(), name


@pytest.mark.parametrize(
    "settings",
    [[], ["train.precision=bf16", "objective=rf", "data.num_workers=2"], ["train.micro_batch_size=8", "model=dit"]],
)
def test_resume_is_exact_at_every_step_of_two_epochs(run, settings):
    settings = [*settings, "train.val_every=3"]
    code, golden = run("golden", *settings)
    assert code == 0
    cuts = range(1, 7) if not settings[:-1] else (2, 5)
    for cut in cuts:
        assert run(f"cut{cut}", *settings, stop_after=cut)[0] == EXIT_START_AGAIN
        code, folder = run(f"cut{cut}", *settings)
        assert code == 0
        assert_same_run(golden, folder)


def test_accumulation_is_the_same_step(run):
    _, whole = run("whole")
    _, parts = run("parts", "train.micro_batch_size=4")
    for a, b in zip(numbers(whole), numbers(parts), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


def test_gradient_checkpointing_changes_no_number(run):
    _, kept = run("kept")
    _, computed_again = run("again", "train.gradient_checkpointing=true")
    assert_same_run(kept, computed_again)


def test_without_a_compiler_training_says_so_and_goes_on(tiny_overrides, tmp_path):
    keys = ["run_name=eager", f"results_dir={tmp_path}", "train.max_steps=2", "train.compile=blocks"]
    without = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "train.py", *tiny_overrides, *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | without)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("precision")]
    assert "compile off: torch.compile does not work here" in line
    assert "trained to step 2" in done.stdout + done.stderr


def test_log_lines_of_steps_taken_again_are_dropped(run):
    _, folder = run("again", "train.save_every=2", stop_after=4)
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "train/loss": 1.0}\n{"step": 6, "tra')  # killed while writing
    run("again", "train.save_every=2")
    assert [line["step"] for line in numbers(folder)] == [1, 2, 3, 4, 5, 6, 7]


def test_ema_and_learning_rate(run):
    _, folder = run("ema", "train.max_steps=1")
    model, ema = (read_tensors(latest_checkpoint(folder) / name) for name in ("model.safetensors", "ema.safetensors"))
    torch.manual_seed(0)
    config = OmegaConf.load(folder / "config.yaml")
    start = training.instantiate(config.model).state_dict()
    key = "x_embedder.proj.weight"
    torch.testing.assert_close(ema[key], start[key] + (1 - 2 / 11) * (model[key] - start[key]))
    _, folder = run("constant", "train.max_steps=1", "train.ema_ramp=false", "train.grad_clip=null")
    model, ema = (read_tensors(latest_checkpoint(folder) / name) for name in ("model.safetensors", "ema.safetensors"))
    torch.testing.assert_close(ema[key], start[key] + (1 - 0.999) * (model[key] - start[key]))
    schedule = OmegaConf.create(dict(lr=1.0, warmup_steps=4, decay_steps=5, max_steps=10))
    rates = [training.learning_rate(step, schedule) for step in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_training_learns(run):
    _, folder = run("learns", "train.max_steps=60", "train.lr=3e-3", "train.val_every=60")
    losses = [line["train/loss"] for line in numbers(folder) if "train/loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def poison(monkeypatch, bad_step, value=float("nan")):
    """One latent of one step becomes NaN or infinity, as a corrupted sample would be."""
    make_loader = training.data.make_loader

    def poisoned(*args, **settings):
        for step, (raw, y) in enumerate(make_loader(*args, **settings), settings["start_step"] + 1):
            if step == bad_step:
                raw = raw.clone()
                raw[0, 0, 0, 0] = value
            yield raw, y

    monkeypatch.setattr(training.data, "make_loader", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stop_at_the_first_gradient_that_is_not_finite(run, monkeypatch, value, capsys):
    _, good = run("good", "train.max_steps=3")
    poison(monkeypatch, 4, value)
    code, folder = run("bad", "train.save_every=3", "train.log_every=7")  # seen only after step 7, when it is read
    assert code == EXIT_NOT_FINITE
    assert latest_checkpoint(folder).name == "step_0000003"  # nothing was saved after it
    dump = json.loads((folder / "nonfinite_step_0000004.json").read_text())
    assert dump["step"] == 4 and len(dump["keys"]) == 16 and len(set(dump["keys"])) >= 14  # two epochs meet in it
    for name in COMPARED[:1]:
        assert (latest_checkpoint(folder) / name).read_bytes() == (latest_checkpoint(good) / name).read_bytes()


def test_no_optimizer_step_after_the_first_non_finite_value(run, monkeypatch):
    taken = []
    check = FiniteGuard.check

    def spy(self, grad_norm, step):
        good = check(self, grad_norm, step)
        taken.append((step, bool(self.found)))
        return good

    monkeypatch.setattr(FiniteGuard, "check", spy)
    poison(monkeypatch, 4)
    run("bad", "train.log_every=7")
    assert taken == [(s, s >= 4) for s in range(1, 8)]


def test_skip_leaves_the_bad_step_out_and_counts_it(run, monkeypatch):
    poison(monkeypatch, 4)
    code, folder = run("skip", "train.on_nonfinite=skip")
    lines = numbers(folder)
    assert code == 0 and [line["train/skipped"] for line in lines] == [0, 0, 0, 1, 1, 1, 1]
    assert lines[3]["train/loss"] is None and all(line["train/loss"] for i, line in enumerate(lines) if i != 3)
    assert all(t.isfinite().all() for t in read_tensors(latest_checkpoint(folder) / "ema.safetensors").values())
    assert read_tensors(latest_checkpoint(folder) / "optimizer.safetensors")["x_embedder.proj.weight/step"] == 6
    code, _ = run("skip0", "train.on_nonfinite=skip", "train.max_skipped=0")
    assert code == EXIT_NOT_FINITE


def test_a_preview_that_crashes_costs_a_warning_and_the_save_came_first(run, monkeypatch, capsys):
    monkeypatch.setattr(training, "preview", lambda *args: 1 / 0)
    code, folder = run("crash", "preview.every=4")
    assert code == 0 and latest_checkpoint(folder).name == "step_0000007"
    warnings = [line for line in capsys.readouterr().err.splitlines() if "preview" in line]
    assert len(warnings) == 2 and all("ZeroDivisionError" in line for line in warnings)


def test_a_preview_is_guided_by_the_runs_own_earliest_checkpoint(run, capsys):
    code, folder = run("auto", "guidance@preview=auto", "preview.every=2", "train.save_every=2", "train.max_steps=6")
    assert code == 0 and sorted(p.name for p in (folder / "samples").iterdir()) == [
        "step_0000004.png", "step_0000006.png",
    ]  # fmt: skip
    warnings = [line for line in capsys.readouterr().err.splitlines() if "preview failed" in line]
    assert len(warnings) == 1 and "step 2" in warnings[0] and "no earlier checkpoint" in warnings[0]


def test_deterministic_algorithms_are_used_where_they_are_asked_for(run, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen, train_step = [], training.train_step

    def watched(*args):
        flash = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        seen.append((torch.are_deterministic_algorithms_enabled(), flash, workspace))
        return train_step(*args)

    monkeypatch.setattr(training, "train_step", watched)
    _, plain = run("plain", "train.max_steps=2")
    _, deterministic = run("deterministic", "train.max_steps=2", "train.deterministic=true")
    _, after = run("after", "train.max_steps=1")
    assert [asked for asked, *_ in seen] == [False, False, True, True, False]
    assert [flash for _, flash, _ in seen] == [True, True, False, False, True] and seen[2][2] == ":4096:8"
    assert_same_run(plain, deterministic)  # on CPUs they are the same bits anyhow


def test_scores_while_training_are_those_of_the_command_line(run, digits, capsys):
    import fid

    settings = [
        f"data.path={digits}", "data.input_size=28", "data.num_classes=10", "model.size=DiT-XS/4", "train.max_steps=2",
        f"eval.digits={digits}", "eval.seeds=0-29", "eval.steps=2", "guidance@eval=cfg", "eval.scale=2.0",
    ]  # fmt: skip
    code, folder = run("scored", "eval.every=2", *settings)
    assert code == 0
    in_training = next(line for line in numbers(folder) if "eval/fd_mnist" in line)
    same = [f"digits={digits}", "seeds=0-29", "steps=2", "guidance=cfg", "scale=2.0"]
    fid.main(["calc", f"ckpt={folder}", *same, f"out={folder}/out"])
    offline = json.loads((folder / "out" / "metrics.json").read_text())
    for name in ("fd_mnist", "class_accuracy"):
        assert in_training[f"eval/{name}"] == pytest.approx(offline[name], rel=1e-9)
    assert len(list((folder / "eval").glob("0000002-fd_mnist-*/metrics.json"))) == 1


def test_an_evaluation_that_crashes_costs_a_warning_and_the_save_came_first(run, digits, capsys):
    code, folder = run("crashing", "eval.every=7", f"eval.digits={digits}")  # the digit classifier refuses 8x8 images
    assert code == 0 and latest_checkpoint(folder).name == "step_0000007"
    assert [line for line in capsys.readouterr().err.splitlines() if "evaluation failed" in line and "28" in line]


def test_the_log_is_complete_after_the_disk_was_full(run, monkeypatch, capsys):
    import builtins
    import errno

    real_open, failures = builtins.open, iter(range(3))

    def full(path, mode="r", *args, **kwargs):
        if str(path).endswith("metrics.jsonl") and mode == "a" and next(failures, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    code, folder = run("full")
    assert code == 0 and [line["step"] for line in numbers(folder)] == list(range(1, 8))
    assert capsys.readouterr().err.count("No space left") == 3


class AbsentWandb:
    """A wandb whose server is away: from the start, or from the first log line on."""

    Settings = staticmethod(dict)

    def __init__(self, at_start):
        self.at_start, self.logged = at_start, 0

    def init(self, **settings):
        if self.at_start:
            raise ConnectionError("no route to host")
        return self

    def define_metric(self, *args, **settings):
        pass

    def log(self, values):
        self.logged += 1
        raise ConnectionError("no route to host")

    def finish(self):
        raise ConnectionError("no route to host")


@pytest.mark.parametrize("at_start, warnings", [(True, 1), (False, 2)])
def test_without_its_server_wandb_costs_a_warning(run, monkeypatch, capsys, at_start, warnings):
    monkeypatch.setitem(sys.modules, "wandb", AbsentWandb(at_start))
    code, folder = run("away", "wandb.mode=online")
    assert code == 0 and len(numbers(folder)) == 7
    assert capsys.readouterr().err.count("no route to host") == warnings


def test_wandb_offline_needs_no_account(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, folder = run("offline", "wandb.mode=offline", "train.max_steps=2")
    assert code == 0 and list(folder.glob("wandb/offline-run-*/*.wandb"))


CHANGES = {
    "model.depth": "7", "model.hidden_size": "64", "model.routes": "[]", "data.num_classes": "4", "objective": "rf",
    "objective.P_mean": "-1.0", "optimizer.weight_decay": "0.1", "optimizer.betas": "[0.9,0.95]", "seed": "1",
    "train.lr": "1e-3", "train.global_batch_size": "32", "train.precision": "bf16", "train.ema_decay": "0.9",
    "train.label_dropout": "0.2", "train.warmup_steps": "3", "train.grad_clip": "0.5", "train.compile": "blocks",
}  # fmt: skip


def test_every_changed_setting_is_refused_by_name(run):
    run("refuse", stop_after=2)
    for key, value in CHANGES.items():
        with pytest.raises(ValueError, match=f"another run.*{key}"):
            run("refuse", f"{key}={value}")
    code, _ = run("refuse", "train.lr=1e-3", "resume_allow=[train.lr]")
    assert code == 0


def test_other_data_is_refused(run, tiny_overrides, digits, tmp_path):
    run("data", stop_after=2)
    other = tmp_path / "other"
    other.mkdir()
    source = next(p.partition("=")[2] for p in tiny_overrides if p.startswith("data.path"))
    (other / "train-000000.tar").write_bytes((tmp_path.__class__(source) / "train-000000.tar").read_bytes())
    with pytest.raises(ValueError, match="fingerprint"):
        run("data", f"data.path={other}")


def test_latents_of_another_scale_are_told_at_the_start(run, tmp_path, capsys):
    arrays = np.random.default_rng(0).normal(0, 5, (20, 1, 8, 8)).astype(np.float32)
    write_shard(tmp_path / "train-000000.tar", arrays, [0] * 20)
    run("unscaled", f"data.path={tmp_path}", "train.max_steps=1")
    err = capsys.readouterr().err
    assert "have standard deviation" in err and "the objective expects about 0.5" in err


def test_resume_null_needs_a_new_name(run):
    run("taken", "train.max_steps=1")
    with pytest.raises(ValueError, match="exists already"):
        run("taken", "resume=null")


def test_a_second_job_on_the_same_folder_is_refused(run):
    import fcntl

    _, folder = run("locked", "train.max_steps=1")
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by process"):
            run("locked")
    assert run("locked")[0] == 0  # the lock of a job that is gone is no lock
