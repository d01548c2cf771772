"""The training loop: what it learns from, exact resume, faults; one process here, two in test_processes.py."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState

import train as training
from checkpoints import run_folder
from checkpoints.config import Train
from checkpoints.load import build_network
from checkpoints.run_folder import complete_checkpoints, latest_checkpoint, read_config, read_tensors, step_of
from routing_module import Routing
from system import UserError
from tests.conftest import COMPARED, ROOT, assert_same_run, numbers, write_shard
from tests.made_runs import made_settings
from training.guard import FiniteGuard
from training.prepare import batch_plan, open_data
from training.stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN


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
    start = build_network(read_config(latest_checkpoint(folder))).state_dict()
    key = "x_embedder.proj.weight"
    torch.testing.assert_close(ema[key], start[key] + (1 - 2 / 11) * (model[key] - start[key]))
    _, folder = run("constant", "train.max_steps=1", "train.ema_ramp=false", "train.grad_clip=null")
    model, ema = (read_tensors(latest_checkpoint(folder) / name) for name in ("model.safetensors", "ema.safetensors"))
    torch.testing.assert_close(ema[key], start[key] + (1 - 0.999) * (model[key] - start[key]))
    schedule = Train(lr=1.0, warmup_steps=4, decay_steps=5, max_steps=10)
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
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: preview")]
    assert len(warnings) == 2 and all("ZeroDivisionError" in line for line in warnings)


def test_a_preview_is_guided_by_the_runs_own_earliest_checkpoint(run, capsys):
    code, folder = run("auto", "guidance@preview=auto", "preview.every=2", "train.save_every=2", "train.max_steps=6")
    assert code == 0 and sorted(p.name for p in (folder / "samples").iterdir()) == [
        "step_0000004.png", "step_0000006.png",
    ]  # fmt: skip
    warnings = [line for line in capsys.readouterr().err.splitlines() if "preview failed" in line]
    assert len(warnings) == 1 and "step 2" in warnings[0] and "no earlier checkpoint" in warnings[0]


def test_a_line_of_the_log_says_how_far_it_is_and_what_was_computed(run, monkeypatch, capsys):
    from training import log

    monkeypatch.setattr(log, "peak_tflops", lambda device, precision: 0.5)
    code, folder = run("said", "model=tread", "train.log_every=2", "train.save_every=4", "train.max_steps=6")
    said, lines = capsys.readouterr().out, [json.loads(line) for line in open(folder / "metrics.jsonl")]
    assert code == 0 and re.findall(r"step (\d)/6 .* eta (\S+)", said)[-1] == ("6", "0:00:00")
    macs = build_network(read_config(latest_checkpoint(folder))).macs(Routing())
    for line in lines:
        assert line["perf/tflops"] == pytest.approx(6 * macs * line["perf/img_per_s"] / 1e12)
        assert line["perf/mfu"] == pytest.approx(line["perf/tflops"] / 0.5) and "perf/host_s" not in line
    assert [line["perf/paused"] > 0 for line in lines] == [False, False, True]  # the save of step 4


def test_the_hours_that_are_left_are_without_the_compilation(tmp_path, monkeypatch, capsys):
    from training import log as logs

    now = np.zeros(2)
    monkeypatch.setattr(logs, "clocks", now.copy)
    log = logs.Log(made_settings(["train.max_steps=100"]), tmp_path, 0, PartialState(), compiled="blocks")
    for seconds in [60] + [1] * 9:  # the first step waits for the compiler
        now += seconds
        log.add(torch.tensor(1.0))
    guard = SimpleNamespace(count=torch.tensor(0.0), first=torch.tensor(0.0), mode="stop")
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    net = build_network(made_settings(["model=dit", "model.depth=1"]))
    log.train(SimpleNamespace(guard=guard, optimizer=optimizer, model=net, step=10), torch.tensor(1.0), 0.0, 0)
    said = capsys.readouterr().out
    assert "compiled   in 60 s" in said and "step_s 6.9 " in said and said.endswith("eta 0:01:30\n"), said


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
    same = [f"digits={digits}", "seeds=0-29", "steps=2", "guidance=cfg", "scale=2.0", "precision=fp32"]
    fid.main(["calc", f"ckpt={folder}", *same, f"out={folder}/out"])
    offline = json.loads((folder / "out" / "metrics.json").read_text())
    for name in ("fd_mnist", "class_accuracy"):
        assert in_training[f"eval/{name}"] == pytest.approx(offline[name], rel=1e-9)
    (made,) = (folder / "eval").glob("0000002-fd_mnist-*/metrics.json")
    before = made.stat().st_mtime_ns
    fid.main(["calc", f"ckpt={folder}", *same, "metrics=[fd]"])  # the same scores have one name
    fid.main(["calc", f"ckpt={folder}", *same])  # and all metrics have another
    assert made.stat().st_mtime_ns > before and len(list((folder / "eval").iterdir())) == 2


def test_an_evaluation_that_crashes_costs_a_warning_and_the_save_came_first(run, digits, capsys):
    code, folder = run("crashing", "eval.every=7", f"eval.digits={digits}")  # the digit classifier refuses 8x8 images
    assert code == 0 and latest_checkpoint(folder).name == "step_0000007"
    assert [line for line in capsys.readouterr().err.splitlines() if "evaluation failed" in line and "28" in line]


def test_the_log_is_complete_after_the_disk_was_full(run, monkeypatch, capsys):
    import builtins

    real_open, failures = builtins.open, iter(range(3))

    def full(path, mode="r", *args, **kwargs):
        if str(path).endswith("metrics.jsonl") and mode == "a" and next(failures, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    code, folder = run("full")
    assert code == 0 and [line["step"] for line in numbers(folder)] == list(range(1, 8))
    assert capsys.readouterr().err.count("No space left") == 3


def test_a_line_that_a_full_disk_has_cut_is_written_whole_later(run, monkeypatch, tmp_path):
    import training.log

    class Full:
        """A file of which the disk takes a few bytes."""

        def __init__(self, path, mode, opener):
            self.file = open(path, mode, opener=opener)

        def __enter__(self):
            return self

        def write(self, text):
            self.file.write(text[:9])

        def __exit__(self, *raised):
            self.file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = iter(range(100))
    make = lambda *given, **how: (Full if next(opened) in (2, 3) else open)(*given, **how)
    monkeypatch.setattr(training.log, "open", make, raising=False)
    _, folder = run("cut_line")
    assert [line["step"] for line in numbers(folder)] == list(range(1, 8))


@pytest.mark.parametrize(
    "broken",
    [b'{"step": 2, "tra{"step": 2, "train/loss": 1.0}\n', b"\0" * 40 + b"\n", b"7\n"],
    ids=["glued", "NUL", "number"],
)
def test_a_log_with_broken_lines_is_repaired_at_the_resume(run, broken, capsys):
    _, folder = run("broken", stop_after=3)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(lines[0] + broken + lines[2])
    code, _ = run("broken")
    assert code == 0 and [line["step"] for line in numbers(folder)] == [1, 3, 4, 5, 6, 7]
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert f"{folder / 'metrics.jsonl'}: left out what is no log line: 2" in warning


def steps_in(folder):
    return [step_of(path) for path in complete_checkpoints(folder)]


@pytest.mark.parametrize("kept", [[], ["train.keep_every=2"]])
def test_going_back_to_an_older_checkpoint_loses_nothing(run, kept, capsys):
    keys = ["train.save_every=2", "train.keep_last=2", "train.max_steps=12", *kept]
    _, folder = run("back", "train.save_every=2", "train.max_steps=12")
    before = {path.name: (path / "manifest.json").read_bytes() for path in complete_checkpoints(folder)}
    log = (folder / "metrics.jsonl").read_bytes()
    back = f"resume={folder}/checkpoints/step_0000004"
    assert run("back", *keys, back, stop_after=7)[0] == EXIT_START_AGAIN
    assert latest_checkpoint(folder).name == "step_0000007"
    assert steps_in(folder) == ([2, 4, 6, 7] if kept else [6, 7])
    (abandoned,) = (folder / "checkpoints").glob("abandoned_*")
    assert capsys.readouterr().out.count(f"later checkpoints are in {abandoned}") == 1
    assert (abandoned / "metrics.jsonl").read_bytes() == log
    assert {p.name: (p / "manifest.json").read_bytes() for p in abandoned.glob("step_*")} == {
        name: content for name, content in before.items() if name > "step_0000004"
    }
    # The same command goes on, as a scheduler would have it; so does resume=auto.
    code, _ = run("back", *keys, back, stop_after=9)
    assert code == EXIT_START_AGAIN and [line["step"] for line in numbers(folder)] == list(range(1, 10))
    assert "goes on at step 7" in capsys.readouterr().out
    assert run("back", *keys)[0] == 0 and steps_in(folder)[-1] == 12
    assert [line["step"] for line in numbers(folder)] == list(range(1, 13))
    assert len(list((folder / "checkpoints").glob("abandoned_*"))) == 1


def test_a_key_newer_than_the_checkpoint_means_its_default(run):
    def forget(folder, key):  # as a version without it would have saved
        path = latest_checkpoint(folder) / "config.yaml"
        config, (section, name) = yaml.safe_load(path.read_text()), key.split(".")
        del config[section][name]
        path.write_text(yaml.safe_dump(config))
        entries = json.loads((latest_checkpoint(folder) / "manifest.json").read_text())
        entries["files"]["config.yaml"] = {"bytes": path.stat().st_size, "sha256": run_folder.sha256_of(path)}
        (latest_checkpoint(folder) / "manifest.json").write_text(json.dumps(entries))

    _, folder = run("older", stop_after=2)
    forget(folder, "optimizer.weight_decay")
    with pytest.raises(UserError, match="another run: optimizer.weight_decay was 0.0, is 0.1"):
        run("older", "optimizer.weight_decay=0.1")
    assert run("older")[0] == 0


def test_file_systems_without_locks_cost_a_warning(run, monkeypatch, capsys):
    for error in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):

        def no_locks(file, how, error=error):
            raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", no_locks)
            assert run(f"unlocked{error}", "train.max_steps=1")[0] == 0
        assert capsys.readouterr().err.count("has no locks") == 1


def test_a_renamed_checkpoint_is_one(run):
    import sample

    _, folder = run("renamed", "train.save_every=2", stop_after=4)
    best = shutil.copytree(folder / "checkpoints" / "step_0000002", folder / "best")
    assert sample.load_run(best).step == 2
    assert run("from_best", f"resume={best}")[0] == 0
    shutil.rmtree(folder / "checkpoints")
    (best / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        sample.load_run(best)


@pytest.mark.parametrize("override", ["resume=true", "resume=3", "optimizer.betas=[0.9]", "optimizer.betas=[0.9,1.5]"])
def test_what_cannot_be_is_refused_in_words(run, override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        run("refused", override)


def test_a_run_that_is_past_its_last_step_says_so(run, capsys):
    run("past", "train.max_steps=3")
    assert run("past", "train.max_steps=2")[0] == 0
    out = capsys.readouterr().out
    assert "trained to step 3, past train.max_steps=2: nothing to do" in out and "trained to step 2" not in out


def asked_to_stop(monkeypatch, target, name):
    """From now on SIGTERM arrives at the start of a function."""
    real = getattr(target, name)

    def stopped(*args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **settings)

    monkeypatch.setattr(target, name, stopped)


@pytest.mark.parametrize("what", ["evaluation", "validation", "preview"])
def test_work_between_steps_is_left_at_once_and_made_again(run, digits, monkeypatch, what):
    settings = {
        "validation": ["train.val_every=3"],
        "preview": ["preview.every=3"],
        "evaluation": [
            "eval.every=3", f"data.path={digits}", "data.input_size=28", "data.num_classes=10",
            "model.size=DiT-XS/4", f"eval.digits={digits}", "eval.seeds=0-9", "eval.steps=2",
        ],
    }[what]  # fmt: skip
    function = {"evaluation": (training, "evaluate"), "validation": (training, "validation_losses")}
    with monkeypatch.context() as patch:
        asked_to_stop(patch, *function.get(what, (training, "preview")))
        code, folder = run(what, *settings, "train.save_every=4")
    assert code == EXIT_START_AGAIN and steps_in(folder) == [3]
    assert [line["step"] for line in numbers(folder)] == [1, 2, 3]
    assert run(what, *settings, "train.save_every=4", "train.max_steps=5")[0] == 0
    made = {
        "evaluation": lambda: len(list((folder / "eval").glob("0000003-*/metrics.json"))),
        "validation": lambda: sum(line["step"] == 3 and "val/loss_dense" in line for line in numbers(folder)),
        "preview": lambda: len(list((folder / "samples").glob("step_0000003.png"))),
    }[what]()
    assert made == 1


DIED = {  # where a job is killed, what the step's log has then: nothing, the validation, and the scores, too
    "validation_losses": [],
    "score_ema": ["val/loss_dense"],
    "preview": ["val/loss_dense", "eval/fd_mnist"],
}


@pytest.mark.parametrize("died_in", DIED)
def test_a_run_killed_after_a_checkpoint_does_what_was_due_and_is_missing(run, digits, monkeypatch, died_in):
    keys = [
        f"data.path={digits}", "data.input_size=28", "data.num_classes=10", "model.size=DiT-XS/4", "train.val_every=3",
        f"eval.digits={digits}", "eval.seeds=0-9", "eval.steps=2", "eval.every=3", "preview.every=3",
        "train.max_steps=4",
    ]  # fmt: skip
    _, golden = run("golden", *keys)

    class Killed(BaseException):
        """Nothing handles it, as nothing handles SIGKILL."""

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, died_in, die)
        with pytest.raises(Killed):
            run("killed", *keys)
    folder = golden.with_name("killed")
    last = [line for line in numbers(folder) if line["step"] == 3]
    assert latest_checkpoint(folder).name == "step_0000003" and "train/loss" in last[0]
    assert [name for line in last[1:] for name in line if name in DIED["preview"]] == DIED[died_in]

    made = []
    for name in DIED:
        work = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *args, name=name, work=work: made.append(name) or work(*args))
    assert run("killed", *keys)[0] == 0
    assert made == list(DIED)[len(DIED[died_in]) :] + list(DIED)  # what step 3 lacks, then all of step 4
    assert_same_run(golden, folder)
    for pattern in ("samples/*.png", "eval/*/metrics.json"):
        found, wanted = ({p.relative_to(f): p.read_bytes() for p in f.glob(pattern)} for f in (folder, golden))
        assert found.keys() == wanted.keys() and len(found) == 2
        assert found == wanted or pattern.startswith("eval")  # which says how many seconds it took
    made.clear()
    assert run("killed", *keys)[0] == 0 and not made  # a finished run is not validated or scored again


def test_going_back_makes_the_previews_of_the_steps_that_follow_anew(run):
    _, folder = run("anew", "preview.every=2", "train.save_every=2", "train.max_steps=4")
    grid = folder / "samples" / "step_0000004.png"
    before = grid.read_bytes()
    keys = ["train.lr=0.1", "resume_allow=[train.lr]", f"resume={folder}/checkpoints/step_0000002"]
    run("anew", "preview.every=2", "train.max_steps=4", *keys)
    assert grid.read_bytes() != before


def test_every_evaluation_has_its_checkpoint_before_it(run, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "extractor_and_reference", lambda settings: ("extractor", "reference"))
    monkeypatch.setattr(
        training, "score_ema", lambda settings, state, folder: seen.append(latest_checkpoint(folder).name) or {}
    )
    run("before", "eval.every=3", "train.save_every=4")
    assert seen == ["step_0000003", "step_0000006", "step_0000007"]


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
    _, folder = run("locked", "train.max_steps=1")
    with open(folder / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by process"):
            run("locked")
    assert run("locked")[0] == 0  # the lock of a job that is gone is no lock


def test_digits_made_at_a_new_path_are_announced(tmp_path, capsys):
    settings, dist = made_settings([f"data.path={tmp_path}/typo"]), PartialState(cpu=True)
    open_data(settings, dist, batch_plan(settings, dist))
    assert capsys.readouterr().out.count("typo does not exist: the digits are made there; yours: data=folder") == 1
    open_data(settings, dist, batch_plan(settings, dist))
    assert not capsys.readouterr().out
