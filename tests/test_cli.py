"""What a user does wrong gets one line on stderr and exit code 2, and nothing is started or lost."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tqdm import tqdm

import train as training
from checkpoints.naming import run_name, sweep_name
from checkpoints.run_folder import find_checkpoint, latest_checkpoint
from dit import DiT
from system import cli, warn
from tests import started
from tests.made_runs import made_settings

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
        assert training.train(made_settings([*tiny_overrides, *own])) == 0
    return results


def assert_refused(result, expected):
    code, _, err = result
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert expected in lines[0], lines[0]


TRAIN = {
    "trian.lr=1": "unknown key 'trian.lr'; did you mean train.lr",
    "ckpt=runs/x": "unknown key 'ckpt' here; other commands have it (configs/: ",
    "train.max_stpes=5": "did you mean train.max_steps",
    "model=maskdit model.routes=[]": "unknown key 'model.routes' here; it belongs to model=dit",
    "+train.foo=1": "unknown key 'train.foo'",
    "lr=1": "unknown key 'lr'; here it is train.lr",
    "epochs=5": "unknown key 'epochs'; here it is train.max_steps",
    "train.learning_rate=1": "unknown key 'train.learning_rate'; here it is train.lr",
    "optimizer.lr=1": "unknown key 'optimizer.lr'; here it is train.lr",
    "train.seed=1": "unknown key 'train.seed'; here it is seed",
    "cfg=2": "guidance@preview=cfg preview.scale=2",
    "guidance=cfg": "unknown key 'guidance'; here it is guidance@preview",
    "--lr=1e-3": "found --lr=1e-3; needed: key=value, without dashes",
    "--lr 1e-3": "found --lr; needed: key=value, without dashes",
    "--run_name=x": "found --run_name=x; needed: key=value, without dashes",  # which begins as --run, of Hydra
    "-n 4": "found -n; needed: key=value, without dashes",
    "datasets/mine": "found datasets/mine; needed: key=value, as in ckpt=datasets/mine, images=datasets/mine or",
    "./photos/": "found ./photos/; needed: key=value, as in",
    "/photos": "found /photos; needed: key=value, as in",
    "~/photos": "found ~/photos; needed: key=value, as in",
    "+train.lr=1": "needed: train.lr=... without the +",
    "model=unet": "unknown model=unet; needed: one of",
    "train.max_steps=many": "train.max_steps=many; needed: a whole number",
    "train.lr=null": "train.lr=null; needed: a number of at least 0",
    "train.max_steps=0": "train.max_steps=0; needed: a whole number of at least 1",
    "train.micro_batch_size=2.5": "train.micro_batch_size=2.5; needed: a whole number of at least 1 or null",
    "train.keep_last=inf": "train.keep_last=Infinity; needed: a whole number",
    "run_name=": "run_name= is empty",
    "results_dir=": "results_dir= is empty",
    "data.path=": "data.path= is empty",
    "init_from=": "init_from= is empty",
    "model=": "unknown model=; needed: one of",
    "train.global_batch_size=30 train.micro_batch_size=7": "is not processes (1) x",
    "train.precision=fp16": "train.precision=fp16; needed: auto, fp32 or bf16",
    "train.compile=yes": "needed: blocks or off",
    "train.on_nonfinite=ignore": "needed: stop or skip",
    "data.path=nowhere": "nowhere",
    "data.input_size=16": "holds latents of shape (1, 8, 8), the model is for (1, 16, 16)",
    "data.num_classes=2": "classes",
    "model.input_size=16": "for latents (1, 16, 16), and data.channels and data.input_size say (1, 8, 8)",
    "model.num_classes=2": "labels 2..2; the model has classes 0..1",
    "model=maskdit model.selection_ratio=0.05 guidance@preview=sparse preview.every=1": "a model trained with routes",
    "model.routes=[{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:9}]": "does not fit a network of 6 blocks",
    "model.routes=[{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:3},"
    "{selection_ratio:0.5,start_layer_idx:3,end_layer_idx:4}]": "routes overlap",
    "model.routes=[{selection_ratio:1.5,start_layer_idx:1,end_layer_idx:3}]": "share of tokens routed away",
    "model.routes=[{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:3,leave_layer_idx:4}]": "no block of the route",
    "model=dit train.dense_last=0.5": "no step of this network has routes",
    "model.size=DiT-M/2": "model size 'DiT-M/2'",
    "optimizer.name=lion": "optimizer.name=lion; needed: adamw or muon",
    "optimizer=muon optimizer.momentum=1.5": "optimizer.momentum=1.5; needed: a number in [0, 1)",
    "ema=power ema.widths=[0.05,0.28]": "ema.widths=[0.05, 0.28]; needed: a list, each a number between 0 and 0.28",
    "ema.widths=0.05": "ema.widths=0.05; needed: a list",
    "objective=rf objective.contrastive=1": "objective.contrastive=1.0; needed: from 0 to below 1",
    "objective=rf objective.contrastive=0.05 train.micro_batch_size=1": "needed: an even size, got 1",
    "objective=rf objective.shift=0": "objective.shift=0.0; needed: above 0",
    "objective=rf objective.predict=noise": "objective.predict=noise; needed: velocity or x",
    "objective.contrastive=0.05": "unknown key 'objective.contrastive'",
    "resume=nowhere": "resume=nowhere: no such",
    "train.grad_clip=0": "train.grad_clip=0; needed: a number above 0 or null",
    "model=dit guidance@preview=sparse preview.every=1": "needs a model trained with routes",
    "guidance@preview=auto preview.weak_ckpt=nowhere preview.every=1": "nowhere",
    "eval.every=1 eval.seeds=abc": "seeds=abc; needed: numbers and ranges",
    "wandb.mode=online": "unknown key 'wandb.mode'; did you mean wandb.project",
    "log=wandb": "log=wandb; needed: a list, each jsonl, tensorboard, wandb or trackio",
    "log=[jsonl,aim,1]": 'log=["jsonl", "aim", 1]; needed: a list, each jsonl, tensorboard, wandb or trackio',
    "log=[wandb,tensorboard]": "and jsonl among them, which resuming reads",
    "results_dir=/proc/nowhere": "/proc/nowhere",
}


@pytest.mark.parametrize("overrides", TRAIN)
def test_train_refuses(command, tiny_overrides, tmp_path, overrides):
    results = tmp_path / "runs"
    assert_refused(command("train.py", *tiny_overrides, f"results_dir={results}", *overrides.split()), TRAIN[overrides])
    assert not results.exists()  # nothing was started


def test_an_existing_run_is_not_touched_when_resume_is_null(command, tiny_overrides, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"}
    result = command("train.py", *tiny_overrides, f"results_dir={trained}", "run_name=tread", "resume=null")
    assert_refused(result, "exists already; set resume=auto")
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"} == before


def test_a_run_of_adamw_is_not_continued_by_muon(command, tiny_overrides, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"}
    keys = [*tiny_overrides, f"results_dir={trained}", "run_name=tread", "optimizer=muon"]
    assert_refused(command("train.py", *keys), "optimizer.name was adamw, is muon")
    assert_refused(command("train.py", *keys, "resume_allow=[optimizer]"), "is of another optimizer: it has")
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != ".lock"} == before


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
        ("sample.py", "ckpt=", "ckpt= is empty"),
        ("sample.py", "out=", "out= is empty"),
        ("fid.py", "calc images=", "images= is empty"),
        ("sample.py", "ckpt={runs}/tread seeds=5-1", "seeds=5-1"),
        ("sample.py", "ckpt={runs}/tread sedes=5", "unknown key 'sedes'; did you mean seeds"),
        ("sample.py", "class=cat", "unknown key 'class'; here it is class_idx"),
        ("sample.py", "resolution=64", "here it is data.input_size of train.py, size of encode_latents.py"),
        ("fid.py", "calc ../my-photos", "found ../my-photos; needed: key=value, as in ckpt=../my-photos, images="),
        ("fid.py", "calc --seeds=0-3", "found --seeds=0-3; needed: key=value, without dashes"),
        ("sample.py", "ckpt={runs}/tread guidance=cgf", "unknown guidance=cgf; needed: one of"),
        ("sample.py", "ckpt={runs}/tread class_idx=3 seeds=0-1", "class"),
        ("sample.py", "ckpt={runs}/tread guidance=sparse gamma_strong=0.8", "gamma_strong < gamma_weak"),
        ("rf.py", "sample_tread ckpt={runs}/dit", "routes"),
        ("rf.py", "draw ckpt={runs}/rf", "unknown command 'draw'; needed: one of sample, sample_tread"),
        ("fid.py", "calc ckpt=nowhere", "nowhere"),
        ("fid.py", "score", "unknown command 'score'"),
        ("fid.py", "calc ckpt={runs}/tread ema_width=0.28", "ema_width=0.28; needed: a number between 0 and 0.28"),
        ("fid.py", "calc ckpt={runs}/tread ema_width=0.07", "needed: a run trained with ema=power"),
        (
            "export.py",
            "ckpt={runs}/tread out=nowhere ema_width=-0.1",
            "ema_width=-0.1; needed: a number between 0 and 0.28",
        ),
        ("export.py", "ckpt={runs}/tread out=nowhere ema_width=0.07", "needed: a run trained with ema=power"),
        ("sample.py", "ckpt={runs}/tread/checkpoints/step_0000001/model.safetensors", "step_0000001, and weights=raw"),
    ],
)
def test_the_other_commands_refuse(command, trained, script, arguments, expected):
    assert_refused(command(script, *arguments.format(runs=trained).split()), expected)


def test_the_file_of_the_average_means_its_checkpoint(command, trained, tmp_path):
    for i, ckpt in enumerate((checkpoint := latest_checkpoint(trained / "tread"), checkpoint / "ema.safetensors")):
        code, out, err = command("sample.py", f"ckpt={ckpt}", "seeds=0-3", "steps=1", f"out={tmp_path / str(i)}")
        assert code == 0 and f"{checkpoint}, ema weights of step 1: 4 of 4 to make" in out, err
    assert (tmp_path / "0" / "grid.png").read_bytes() == (tmp_path / "1" / "grid.png").read_bytes()
    assert find_checkpoint(checkpoint / "ema.safetensors") == checkpoint


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_says_that_the_same_command_goes_on(trained, tmp_path, processes):
    command = [sys.executable, "sample.py", f"ckpt={trained / 'tread'}", "seeds=0-99999", "batch_size=8"]
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(started.free_port()), "WORLD_SIZE": str(processes)}
    with open(tmp_path / "err", "w") as err:
        running = []
        for rank in range(processes):
            env = os.environ | ({**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            how = dict(env=env, stdout=subprocess.DEVNULL, stderr=err)
            running.append(started.Process([*command, f"out={tmp_path / 'out'}"], **how))
        deadline = time.time() + 60
        while len(list(tmp_path.glob("out/images/*/*.png"))) < 20 and time.time() < deadline:
            time.sleep(0.02)
        for process in running:
            process.send_signal(signal.SIGINT)
        assert [process.wait(30) for process in running] == [130] * processes
    said = (tmp_path / "err").read_text()
    assert said.count("stopped: the same command goes on") == 1 and "Traceback" not in said, said
    made = len(list(tmp_path.glob("out/images/*/*.png")))
    again = started.run([*command[:3], f"seeds=0-{made // 2 - 1}", "batch_size=8", f"out={tmp_path / 'out'}"])
    assert again.returncode == 0 and (processes > 1 or f"0 of {made // 2} to make" in again.stdout), again.stderr


def test_whole_numbers_may_be_written_with_an_exponent(command, tiny_overrides, tmp_path):
    keys = ["train.val_samples=1e1", "train.val_every=1e0", "train.keep_last=2e0", "train.micro_batch_size=8e0"]
    for steps in ("2e0", "3e0"):  # a start, and a resume
        code, _, err = command(
            "train.py", *tiny_overrides, *keys, f"results_dir={tmp_path}", "run_name=x", f"train.max_steps={steps}"
        )
        assert code == 0, err
    saved = yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["train"]
    assert type(saved["max_steps"]) is type(saved["keep_last"]) is type(saved["micro_batch_size"]) is int


ODD_NAMES = ["model=tread", "a b", "é,ü", "(copy)", "it's", "[1]", "back\\slash", "#1", "a: b", "50%", "~x"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_paths_are_taken_as_they_are(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    assert cli.load_config("sample", [f"ckpt={folder}"])["ckpt"] == str(folder)
    assert cli.load_config("sample", [f"ckpt=sit:{folder}"])["ckpt"] == f"sit:{folder}"
    assert cli.load_config("config", [f"data.path={folder}/new"])["data"]["path"] == f"{folder}/new"
    if "'" not in name:  # as before, in Hydra's quotes
        assert cli.load_config("sample", [f"ckpt='{folder}'"])["ckpt"] == str(folder)
    swept = cli.combinations([f"ckpt={folder}", "scale=1,2"])
    assert [cli.load_config("fid", row)["ckpt"] for row in swept] == [str(folder)] * 2
    swept = cli.combinations([f"ckpt=first,{folder}"]) if "," not in name else []
    assert [cli.load_config("fid", row)["ckpt"] for row in swept] == ["first", str(folder)][: len(swept)]


def test_a_run_in_a_folder_of_an_odd_name_trains_and_resumes(command, tiny_overrides, tmp_path):
    own = [f"results_dir={tmp_path}/ö=1, (2)", "run_name=a 'b'"]
    for steps in (1, 2):
        code, out, err = command("train.py", *tiny_overrides, *own, f"train.max_steps={steps}")
        assert code == 0 and f"trained to step {steps}" in out, err
    assert latest_checkpoint(tmp_path / "ö=1, (2)" / "a 'b'").name == "step_0000002"


def test_default_names_tell_sizes_and_experiments_apart():
    choices = {"data": "imagenet256", "model": "dit", "objective": "ddpm", "experiment": "imagenet256"}
    assert run_name(choices, "XL2") == "imagenet256-dit-XL2-ddpm"
    assert run_name(choices, "S2") == "imagenet256-dit-S2-ddpm"
    assert run_name(choices | {"experiment": "finetune"}, "XL2") == "finetune-imagenet256-dit-XL2-ddpm"
    assert run_name(choices | {"experiment": None, "data": "mnist"}, "XS4") == "mnist-dit-XS4-ddpm"


def test_a_run_without_a_name_gets_the_default_one(command, tiny_overrides, tmp_path):
    code, _, err = command("train.py", *tiny_overrides, f"results_dir={tmp_path}/runs", "train.max_steps=1")
    assert code == 0 and [p.name for p in (tmp_path / "runs").iterdir()] == ["mnist-tread-XS2-edm"], err


def test_names_of_sweeps_need_no_quotes_and_never_meet():
    names = [sweep_name([f"train.lr={lr}", f"model.size={size}"]) for lr in ("1e-3", "2e-3") for size in ("S/2", "S/4")]
    assert names[0] == "train.lr-1e-3_model.size-S-2" and len(set(names)) == 4
    odd = [sweep_name([f"optimizer.betas={betas}"]) for betas in ("[0.9,0.99]", "[0.9,0.9,9]", "[0.9,0.999]")]
    assert len(set(odd)) == 3
    for name in names + odd:
        assert shlex.quote(name) == name and not set("=, ") & set(name)


def test_a_run_starts_from_a_file_of_another_project(command, tiny_overrides, tmp_path):
    net = DiT(8, 2, 1, 128, 6, 4, num_classes=3, learn_sigma=False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(net.state_dict(), tmp_path / "DiT-a=b.pt")
    own = [
        "model=dit",
        "objective=ddpm",
        "model.learn_sigma=false",
        "model.hidden_size=128",
        "model.num_heads=4",
        "train.lr=0",
    ]
    own += [f"results_dir={tmp_path}", "run_name=own", "train.max_steps=1", f"init_from={tmp_path}/DiT-a=b.pt"]
    code, _, err = command("train.py", *tiny_overrides, *own)
    assert code == 0, err
    ema = load_file(latest_checkpoint(tmp_path / "own") / "ema.safetensors")
    assert all(torch.equal(value, ema[key]) for key, value in net.state_dict().items())


def test_help_is_no_error(command):
    for script in ("train.py", "sample.py", "rf.py", "fid.py", "export.py", "cost.py", "tests/test_sanity_scores.py"):
        for words in ("--help", "sample --help", "ckpt=runs/x -h"):
            code, out, _ = command(script, *words.split())
            assert code == 0 and Path(script).stem in out


def test_a_warning_has_a_line_of_its_own_beside_a_bar(capsys):
    with tqdm(total=2, disable=False):
        warn("late")
    assert re.search(r"\r *\rwarning: late\n", capsys.readouterr().err)


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
