"""No work is lost to a run's surroundings: standard output, locale, home, signals, damage under way."""

import errno
import os
import select
import signal
import subprocess
import sys

import pytest
import torch

from system import surroundings
from tests import started
from tests.conftest import ROOT
from training.stopping import Interrupted, PreemptionHandler


def put(descriptor, *lines):
    out = surroundings.Output(descriptor)
    for line in lines:
        view = memoryview(line)
        while view:
            view = view[out.write(view) :]


def test_output_that_nobody_takes_is_dropped(monkeypatch):
    monkeypatch.setattr(surroundings, "UNREAD_S", 0.1)
    read, write = os.pipe()
    put(write, b"x" * 300_000, b"y" * 300_000)  # a pipe holds 64 KiB
    assert set(os.read(read, 1 << 20)) == set(b"x")
    put(write, b"z")
    assert os.read(read, 10) == b"z"
    os.close(read)
    put(write, b"nobody is there")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
def test_a_full_disk_takes_no_output_and_stops_nobody():
    with open("/dev/full", "wb", buffering=0) as full:
        put(full.fileno(), b"x" * 10_000)


def test_what_is_read_gets_all_of_it():
    read, write = os.pipe()
    sent = os.urandom(3 * select.PIPE_BUF + 5)
    put(write, sent)
    assert os.read(read, 1 << 20) == sent


NOWHERE = (
    "import os, pwd, sys\ndef gone(*_): raise KeyError('uid')\npwd.getpwuid = pwd.getpwnam = gone\n"
    "from system.surroundings import settle_in\nsettle_in()\nimport getpass, locale, pathlib\n"
    "print(getpass.getuser(), locale.getpreferredencoding(False).lower().replace('-', ''), sys.stdout.encoding)\n"
    "assert os.access(os.environ['XDG_CACHE_HOME'], os.W_OK) and pathlib.Path.home().is_dir()\n"
)


@pytest.mark.parametrize("closed", ["", " >&-"])
def test_without_a_home_a_name_a_locale_or_an_output(tmp_path, closed):
    (tmp_path / "ask.py").write_text(NOWHERE)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} {tmp_path / 'ask.py'}{closed}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert closed or done.stdout == f"user{os.getuid()} utf8 utf-8\n"


class Dist:
    device, is_main_process = torch.device("cpu"), True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_interrupt_until_the_first_step_is_over(number):
    before = signal.signal(number, signal.SIG_DFL)  # also where the suite runs under nohup
    handler = PreemptionHandler(Dist)
    try:
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # once
        assert handler.stops_after(1) and handler.reason == number.name
        handler = PreemptionHandler(Dist)
        assert not handler.stops_after(1)
        os.kill(os.getpid(), number)
        assert handler.stops_after(2)
    finally:
        handler.close()
        signal.signal(number, before)


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    try:
        handler = PreemptionHandler(Dist)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not handler.stops_after(1)
        handler.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_it_starts_is_answered(tiny_overrides, tmp_path):
    (tmp_path / "slow.py").write_text(
        f"import os, sys, signal\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        "from tests.made_runs import made_settings\n"
        "train.open_data = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(train.train(made_settings(sys.argv[1:])))\n"
    )
    run = tmp_path / "run"
    run.mkdir()  # as of a run that is continued
    command = [sys.executable, tmp_path / "slow.py", *tiny_overrides, f"results_dir={tmp_path}", "run_name=run"]
    done = started.run(command)
    assert done.returncode == 75 and (run / "start_again").read_text() == "SIGTERM before the first step was over\n"
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_damage_found_while_training_saves_first(run, tiny_overrides, monkeypatch):
    import train
    from checkpoints.run_folder import latest_checkpoint
    from system import UserError

    real = train.train_step

    def step(settings, loaded, state, batches):
        if state.step == 4:
            raise UserError("damaged data")
        return real(settings, loaded, state, batches)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(UserError, match="damaged data"):
        run("cut")
    monkeypatch.setattr(train, "train_step", real)
    code, folder = run("cut", stop_after=None)
    assert code == 0 and latest_checkpoint(folder).name == "step_0000007"
    assert (folder / "checkpoints" / "step_0000003").is_dir()


def test_a_validation_that_fails_is_survived(run, monkeypatch, capsys):
    import train

    def fail(*_):
        raise RuntimeError("made to fail")

    monkeypatch.setattr(train, "validation_losses", fail)
    code, _ = run("blind", "train.val_every=3")
    assert code == 0 and "validation failed" in "".join(capsys.readouterr())


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    from system.files import atomic_file, sync

    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_file(tmp_path / "a") as file:
        file.write(b"whole")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
    with pytest.raises(OSError):
        sync(tmp_path / "a")
