"""Real processes: two on gloo train what one trains; signals. What they survive: tests/faults.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.run_folder import complete_checkpoints, latest_checkpoint, read_tensors
from system import UserError
from system.files import reserve
from system.launchers import refuse_sharding, usable_cpus
from tests import started
from tests.conftest import COMPARED, ROOT, TORCHRUN, numbers


def start(command, *overrides):
    """A training job in a process group of its own, on one thread a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "train.py", *overrides], cwd=ROOT, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(folder, step, seconds=60):
    """Until the log has a line of this step or a later one."""
    deadline = time.monotonic() + seconds
    log = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} did not reach step {step} in {seconds} s")


def workers(job):
    """Process ids of a job's training processes, in the order of their ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        rank = [e for e in environment if e.startswith(b"RANK=")]
        if rank and parent == job.pid:
            found[int(rank[0].partition(b"=")[2])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def settings(tiny_overrides, tmp_path_factory):
    results = tmp_path_factory.mktemp("runs")
    own = [f"results_dir={results}", "train.max_steps=90", "train.val_every=30", "preview.every=90"]
    return [*tiny_overrides, *own], results


@pytest.fixture(scope="module")
def golden(settings):
    """90 undisturbed steps on two processes."""
    job = started.run([sys.executable, "train.py", *settings[0], "run_name=golden"], processes=2)
    assert job.returncode == 0, job.stderr
    return settings[1] / "golden", job.stdout


def test_two_processes_train_the_run_of_one(golden, settings):
    folder, out = golden
    job = started.run([sys.executable, "train.py", *settings[0], "run_name=one"])
    assert job.returncode == 0, job.stderr
    two, one = numbers(folder), numbers(settings[1] / "one")
    assert [line["step"] for line in two] == [line["step"] for line in one] and len(two) == 93
    for a, b in zip(two, one):
        assert a == pytest.approx(b, rel=1e-3), a["step"]
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    # Each thing once: one header, one grid, one folder a checkpoint.
    assert out.count("parameters") == 1 and out.count("trained to step") == 1
    assert len(list((folder / "samples").iterdir())) == 1 and len(complete_checkpoints(folder)) == 1
    assert "= 2 processes x 8" in out


@pytest.mark.parametrize("number, rank", [pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_nothing_is_lost(golden, settings, number, rank):
    name = f"run_name=signal{number.value}"
    folder = settings[1] / name.partition("=")[2]
    job = start(TORCHRUN, *settings[0], name)
    wait_for(folder, 20)
    os.kill(workers(job)[rank], number)
    out, err = job.communicate(timeout=60)
    assert f"stopped by {number.name} after step" in out and "exitcode  : 75" in err
    stopped = numbers(folder)[-1]["step"]
    assert latest_checkpoint(folder).name == f"step_{stopped:07d}" and 20 <= stopped < 90
    job = started.run([sys.executable, "train.py", *settings[0], name], processes=2)
    assert job.returncode == 0 and "from" in job.stdout, job.stderr
    assert numbers(folder) == numbers(golden[0])
    for file in COMPARED:
        assert (latest_checkpoint(folder) / file).read_bytes() == (latest_checkpoint(golden[0]) / file).read_bytes()


def test_weights_that_drift_apart_are_noticed_bit_for_bit(tmp_path):
    script = tmp_path / "drift.py"
    script.write_text(
        "import sys, torch\nsys.path.insert(0, sys.argv[1])\n"
        "import train\nfrom system.processes import start_processes\n"
        "dist = start_processes()\ntorch.manual_seed(0)\nmodel = torch.nn.Linear(3, 3)\n"
        "train.check_replicas(model, 1, dist)\n"
        "if dist.process_index == 1:\n"
        "    model.weight.data[0, 0] = torch.nextafter(model.weight.data[0, 0], torch.tensor(9.0))\n"
        "try:\n    train.check_replicas(model, 2, dist)\nexcept ValueError as error:\n    print(error, flush=True)\n"
    )
    done = started.run([sys.executable, script, ROOT], processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at step 2 the weights of processes [1] differ") == 2


def test_a_bad_gradient_on_one_process_stops_all_before_the_update(settings, tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, sys, torch\nsys.path.insert(0, sys.argv[1])\n"
        "import train\nfrom tests.made_runs import made_settings\nstep = train.train_step\n"
        "def poisoned(settings, loaded, state, batches):\n"
        "    if state.step == 6 and loaded.plan.rank == 1:\n"
        "        state.model.final_layer.linear.bias.register_hook(lambda grad: grad * torch.inf)\n"
        "    return step(settings, loaded, state, batches)\n"
        "train.train_step = poisoned\n"
        "code = train.train(made_settings(sys.argv[2:]))\n"
        "from system.processes import end_processes\nend_processes()\nsys.exit(code)\n"  # as train.py leaves
    )
    keys = [*settings[0], "run_name=poisoned", "train.save_every=5", "train.log_every=10"]
    done = started.run([sys.executable, script, ROOT, *keys], processes=2)
    assert done.returncode == 3 and "a gradient of step 6 was not finite" in done.stdout, done.stderr
    assert latest_checkpoint(settings[1] / "poisoned").name == "step_0000005"
    assert (settings[1] / "poisoned" / "nonfinite_step_0000006.json").is_file()


def test_a_run_goes_on_with_another_number_of_processes(golden, settings):
    command = [sys.executable, "train.py", *settings[0], "run_name=world"]
    assert started.run([*command, "train.max_steps=30", "train.val_every=30"], processes=2).returncode == 0
    job = started.run(command)
    assert job.returncode == 0 and "= 1 processes x 16" in job.stdout, job.stderr
    for a, b in zip(numbers(settings[1] / "world"), numbers(golden[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-3), a["step"]


ON_ONE_CPU = (  # or a lone process under accelerate would take all of them, as it should
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def accelerate(*flags):
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]  # a free one
    return [sys.executable, "-c", ON_ONE_CPU, *launch, *flags]


LAUNCHED = {  # launcher, signal, exit code that the caller sees
    "torchrun": (TORCHRUN, signal.SIGTERM, 1),
    "torchrun, which knows no SIGUSR1": (TORCHRUN, signal.SIGUSR1, -signal.SIGUSR1),
    "accelerate, one process": (accelerate("--num_processes", "1", "--cpu"), signal.SIGTERM, -signal.SIGTERM),
}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_signal_to_the_launcher_alone_saves_and_leaves_no_orphan(settings, launcher):
    """docs/reliability.md has the table of all launchers and signals."""
    command, number, code = LAUNCHED[launcher]
    folder = settings[1] / f"launched{list(LAUNCHED).index(launcher)}"
    own = ["train.max_steps=100000", "train.log_every=7", "train.val_every=0", "preview.every=0"]
    job = start(command, *settings[0], f"run_name={folder.name}", *own)
    wait_for(folder, 20)
    os.kill(job.pid, number)
    assert job.wait(60) == code
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (folder / "start_again").exists():
        time.sleep(0.05)
    reason, _, steps = (folder / "start_again").read_text().strip().partition(" after step ")
    assert reason and 0 <= int(steps) - numbers(folder)[-1]["step"] < 7  # no step is lost
    assert latest_checkpoint(folder).name == f"step_{int(steps):07d}"
    job.communicate(timeout=30)  # the processes that trained have closed the pipes,
    reserve(folder).close()  # and hold no lock


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "megatron_lm"])
def test_a_launcher_that_is_to_divide_the_model_is_refused(name, monkeypatch):
    refuse_sharding()
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UserError, match=f"--use_{name} .*train.gradient_checkpointing"):
        refuse_sharding()


def test_a_library_call_leaves_the_process_as_it_is(tmp_path):
    script = tmp_path / "library.py"
    script.write_text(
        "import os, sys\nsys.path.insert(0, sys.argv[1])\n"
        "import torch._dynamo, sample\nfrom guidance import Guidance\nfrom system import launchers\n"
        "launchers.keep_freed_memory = launchers.end_with_launcher = None\n"  # whoever calls them fails
        "before = dict(os.environ), torch.get_num_threads(), os.getcwd()\n"
        "run = sample.load_run(sys.argv[1] + '/assets/mnist-tread-edm/model.safetensors')\n"
        "next(sample.generate(run, Guidance(), [0], steps=1))\n"
        "assert (dict(os.environ), torch.get_num_threads(), os.getcwd()) == before\n"
    )
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, ROOT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert usable_cpus() == 1


def test_max_hours_stops_early_with_the_exit_code_to_start_again(settings):
    job = started.run([sys.executable, "train.py", *settings[0], "run_name=hours", "train.max_hours=1e-6"])
    assert job.returncode == 75 and "stopped by max_hours after step 1" in job.stdout, job.stderr


def test_a_second_interrupt_leaves_at_once(settings, tmp_path):
    folder = settings[1] / "twice"
    slow = program(tmp_path, "from system import files\nimport time, os\nos.fsync = lambda descriptor: time.sleep(3)\n")
    keys = ["run_name=twice", "train.max_steps=100000", "train.save_every=30"]
    job = started.Process([sys.executable, slow, *settings[0], *keys], stdout=subprocess.DEVNULL)
    wait_for(folder, 30)  # and now it saves, for long
    os.kill(job.pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(5) == 130


def program(folder, change):
    """train.py with something changed, as a file to launch."""
    path = folder / "changed.py"
    lead = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom system import cli\n"
    lead += "from tests.made_runs import made_settings\n"
    path.write_text(
        f"{lead}{change}\noverrides = [argument for argument in sys.argv[1:] if argument != 'train.py']\n"
        "with cli.user_errors():\n    code = train.train(made_settings(overrides))\nsys.exit(code)\n"
    )
    return str(path)


def test_sigterm_to_the_launcher_leaves_an_evaluation_at_once(settings, digits):
    keys = [
        f"data.path={digits}", "data.input_size=28", "data.num_classes=10", "model.size=DiT-XS/4", "run_name=evaluated",
        f"eval.digits={digits}", "eval.seeds=0-9999", "eval.steps=50", "eval.every=5", "train.save_every=100",
    ]  # fmt: skip
    folder = settings[1] / "evaluated"
    job = start(TORCHRUN, *settings[0], *keys)
    wait_for(folder, 5)
    time.sleep(1.5)
    job.terminate()
    assert any("stopped by SIGTERM after step 5, saved" in line for line in job.stdout)
    job.communicate(timeout=60)  # to score all 10,000 images takes much longer
    assert latest_checkpoint(folder).name == "step_0000005"


def test_an_error_of_one_process_is_told_once_with_its_traceback(settings, tmp_path):
    failing = program(
        tmp_path,
        "step = train.train_step\ndef fail(settings, loaded, state, batches):\n"
        "    if state.step == 5 and loaded.plan.rank == 1:\n        raise RuntimeError('made to fail')\n"
        "    return step(settings, loaded, state, batches)\ntrain.train_step = fail\n",
    )
    job = start([*TORCHRUN, failing], *settings[0], "run_name=raising")
    out, err = job.communicate(timeout=120)
    assert job.returncode != 0 and err.count("process 1 failed first:") == 1 and "lost the others" not in err, err
    assert err.count("RuntimeError: made to fail") == 1 and ", in fail\n" in err


def test_a_mistake_of_the_users_is_told_once(settings):
    job = start(TORCHRUN, *settings[0], "train.max_step=3")
    out, err = job.communicate(timeout=120)
    assert job.returncode != 0 and err.count("unknown key 'train.max_step'") == 1, err


def test_sweeps_give_a_complete_run_a_job(settings):
    overrides = [o for o in settings[0] if not o.startswith("train.max_steps")]
    command = [sys.executable, "train.py", "-m", *overrides, "model=dit,tread", "train.max_steps=2"]
    done = started.run(command)
    assert done.returncode == 0, done.stderr
    folders = sorted(p.parent for p in (settings[1] / "multirun").glob("*/config.yaml"))
    assert len(folders) == 2 and all(latest_checkpoint(f).name == "step_0000002" for f in folders)
    assert [f.name for f in folders] == ["model-dit", "model-tread"]


def test_muon_averages_and_contrasts_on_two_processes_are_those_of_one(settings):
    """Each process orthogonalizes half of the matrices; the weights are compared bit for bit after each step."""
    keys = ["optimizer=muon", "ema=power", "objective=rf", "objective.contrastive=0.05", "train.max_steps=12"]
    keys += ["train.check_replicas_every=1", "train.micro_batch_size=4", "preview.every=0", "train.val_every=12"]
    for processes in (1, 2):
        command = [sys.executable, "train.py", *settings[0], *keys, f"run_name=muon{processes}"]
        job = started.run(command, processes=processes)
        assert job.returncode == 0, job.stderr
    two, one = (settings[1] / name for name in ("muon2", "muon1"))
    for a, b in zip(numbers(two), numbers(one), strict=True):
        assert a == pytest.approx(b, rel=2e-3), a["step"]
    for file in ("model", "power_0.05", "optimizer"):
        found, wanted = (read_tensors(latest_checkpoint(folder) / f"{file}.safetensors") for folder in (two, one))
        assert found.keys() == wanted.keys()
        for name in found:
            difference = (found[name] - wanted[name]).norm()
            assert difference <= 0.02 * wanted[name].norm() or name.endswith("qkv.bias"), (file, name)  # rounding alone


@pytest.mark.parametrize("mixer", ["ssd", "rwkv"])
def test_other_mixers_on_two_processes_train_the_run_of_one(mixer, settings):
    """With their routes of whole rows, drawn for each row of the whole batch."""
    keys = [key for key in settings[0] if "num_heads" not in key]
    keys += [f"model={mixer}", "model.routes=[{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:-2,selection:rows}]"]
    keys += ["train.max_steps=6", "train.val_every=6", "preview.every=0"]
    for processes in (1, 2):
        command = [sys.executable, "train.py", *keys, f"run_name={mixer}{processes}"]
        job = started.run(command, processes=processes)
        assert job.returncode == 0, job.stderr
    two, one = (numbers(settings[1] / f"{mixer}{processes}") for processes in (2, 1))
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-3), a["step"]
