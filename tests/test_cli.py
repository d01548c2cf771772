"""What a user does wrong gets one line on stderr and exit code 2, and nothing is started or lost."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import train as training
from system import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(tmp_path):
    """command("train.py", ...) -> (exit code, stdout, stderr) of the script, run as a main program in a forked
    child."""

    def command(script, *arguments):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 0
            try:
                for descriptor, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                torch.set_num_threads(1)
                sys.argv = [script, *map(str, arguments)]
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as leaving:
                code = leaving.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()

    return command


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory):
    """Run folders of one step: tread with EDM, dit with EDM, tread with rectified flow."""
    results = tmp_path_factory.mktemp("runs")
    for name, *extra in (("tread",), ("dit", "model=dit"), ("rf", "objective=rf")):
        own = [f"results_dir={results}", f"run_name={name}", "train.max_steps=1", *extra]
        assert training.train(cli.load_config("config", [*tiny_overrides, *own])) == 0
    return results


def assert_refused(result, expected):
    code, _, err = result
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert expected in lines[0], lines[0]


TRAIN = {
    "trian.lr=1": "unknown key 'trian.lr'; did you mean train.lr",
    "train.max_stpes=5": "did you mean train.max_steps",
    "+train.foo=1": "unknown key 'train.foo'",
    "model=unet": "unknown model=unet; needed: one of",
    "train.max_steps=many": "train.max_steps=many; needed: a whole number",
    "train.lr=null": "train.lr=None; needed: a number",
    "train.max_steps=0": "train.max_steps=0; needed: at least 1",
    "train.global_batch_size=30 train.micro_batch_size=7": "is not processes (1) x",
    "train.precision=fp16": "precision 'fp16'",
    "train.compile=yes": "needed: blocks or off",
    "train.on_nonfinite=ignore": "needed: stop or skip",
    "data.path=nowhere": "nowhere",
    "data.input_size=16": "holds latents of shape (1, 8, 8), the model is for (1, 16, 16)",
    "data.num_classes=2": "classes",
    "model.routes=[{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:9}]": "does not fit a network of 6 blocks",
    "model.routes=[{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:3},"
    "{selection_ratio:0.5,start_layer_idx:3,end_layer_idx:4}]": "routes overlap",
    "model.routes=[{selection_ratio:1.5,start_layer_idx:1,end_layer_idx:3}]": "share of tokens routed away",
    "model.size=DiT-M/2": "model size 'DiT-M/2'",
    "resume=nowhere": "ckpt=nowhere",
    "wandb.mode=maybe": "needed: disabled, offline or online",
    "results_dir=/proc/nowhere": "/proc/nowhere",
}


@pytest.mark.parametrize("overrides", TRAIN)
def test_train_refuses(command, tiny_overrides, tmp_path, overrides):
    results = tmp_path / "runs"
    assert_refused(command("train.py", *tiny_overrides, f"results_dir={results}", *overrides.split()), TRAIN[overrides])
    assert not results.exists()  # nothing was started


def test_an_existing_run_is_not_touched_when_resume_is_null(command, tiny_overrides, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    result = command("train.py", *tiny_overrides, f"results_dir={trained}", "run_name=tread", "resume=null")
    assert_refused(result, "exists already; set resume=auto")
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_an_empty_data_folder_is_refused(command, tiny_overrides, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(command("train.py", *tiny_overrides, f"data.path={tmp_path / 'empty'}"), "no train shards")


def test_a_label_outside_the_classes_is_refused(command, tiny_overrides, few_latents, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    for shard in few_latents.glob("*.tar"):
        (folder / shard.name).write_bytes(shard.read_bytes().replace(b"2" + b"\0" * 511, b"7" + b"\0" * 511))
    result = command("train.py", *tiny_overrides, f"data.path={folder}", "data.num_classes=3")
    assert_refused(result, "8 classes, the model has data.num_classes=3")


@pytest.mark.parametrize(
    "script, arguments, expected",
    [
        ("sample.py", "ckpt=nowhere", "ckpt=nowhere"),
        ("sample.py", "ckpt=tests", "not a checkpoint"),
        ("sample.py", "ckpt={runs}/tread seeds=5-1", "seeds=5-1"),
        ("sample.py", "ckpt={runs}/tread sedes=5", "unknown key 'sedes'; did you mean seeds"),
        ("sample.py", "ckpt={runs}/tread guidance=cgf", "unknown guidance=cgf; needed: one of"),
        ("sample.py", "ckpt={runs}/tread class_idx=3 seeds=0-1", "class"),
        ("sample.py", "ckpt={runs}/tread guidance=sparse gamma_strong=0.8", "gamma_strong < gamma_weak"),
        ("rf.py", "sample_tread ckpt={runs}/dit", "routes"),
        ("rf.py", "draw ckpt={runs}/rf", "unknown command 'draw'; needed: one of sample, sample_tread"),
        ("fid.py", "calc ckpt=nowhere", "nowhere"),
        ("fid.py", "score", "unknown command 'score'"),
    ],
)
def test_the_other_commands_refuse(command, trained, script, arguments, expected):
    assert_refused(command(script, *arguments.format(runs=trained).split()), expected)


def test_help_is_no_error(command):
    for script in ("rf.py", "fid.py"):
        code, out, _ = command(script, "--help")
        assert code == 0 and script in out


def test_the_resolved_config_can_be_shown(command):
    code, out, err = command("train.py", "--cfg", "job", "model=dit")
    assert code == 0 and "max_steps" in out and "routes: []" in out, err


def test_an_internal_error_keeps_its_traceback(command, tiny_overrides, tmp_path, monkeypatch):
    import dit

    def broken(self, *inputs):
        raise ValueError("inside a block")

    monkeypatch.setattr(dit.Block, "forward", broken)  # the command runs in a fork of this process
    code, out, err = command("train.py", *tiny_overrides, f"results_dir={tmp_path}", "run_name=broken")
    assert code == 1
    assert "Traceback" in err and err.rstrip().endswith("ValueError: inside a block")
    assert "error:" not in err.lower().replace("valueerror:", "")
