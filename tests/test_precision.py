"""precision=auto: who decides, by what, and that all processes and a resumed run keep to it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import sample
from checkpoints.load import load_run
from checkpoints.run_folder import latest_checkpoint, read_config
from system import precision
from system.precision import cpu_precision
from tests.conftest import ROOT, TORCHRUN
from tests.made_runs import make_run

CPU = torch.device("cpu")
AVX512 = "avx2 fma avx512f avx512dq avx512cd avx512bw avx512vl"
FLAGS = {  # as /proc/cpuinfo has them, with what oneDNN could use
    "AMX": f"GenuineIntel {AVX512} avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8",  # Xeon 8481C
    "AMD": f"AuthenticAMD {AVX512} avx512ifma avx512_bf16 avx512vbmi avx512_vnni avx512_bitalg",  # EPYC 9B14
    "Intel": f"GenuineIntel {AVX512} avx512_vnni avx512_bf16",  # Xeon 8376H, without AMX
    "AVX-512": f"GenuineIntel {AVX512} avx512_vnni",  # Xeon 8375C
    "AVX2": "AuthenticAMD avx2 fma",
    "unknown": "",
}


@pytest.mark.parametrize(
    "cpu, expected, why",
    [
        ("AMX", "bf16", "matrix units"), ("AMD", "bf16", "twice as fast"), ("Intel", "fp32", "slower on this CPU"),
        ("AVX-512", "fp32", "no bf16 units"), ("AVX2", "fp32", "no bf16 units"), ("unknown", "fp32", "nothing"),
    ],
)  # fmt: skip
def test_a_cpu_is_known_by_its_flags(cpu, expected, why):
    for max_isa in ("", "ALL", "default"):
        chosen, reason = cpu_precision(FLAGS[cpu].split(), max_isa)
        assert chosen == expected and why in reason


@pytest.mark.parametrize(
    "max_isa, expected",  # on AMX, AMD, Intel
    [
        ("AVX512_CORE_AMX", ("bf16", "bf16", "fp32")), ("AVX512_CORE_AMX_FP16", ("bf16", "bf16", "fp32")),
        ("AVX512_CORE_BF16", ("fp32", "bf16", "fp32")), ("AVX512_CORE_FP16", ("fp32", "bf16", "fp32")),
        ("AVX10_1_512", ("fp32", "bf16", "fp32")), ("AVX10_1_512_AMX", ("bf16", "bf16", "fp32")),
        ("AVX512", ("bf16", "bf16", "fp32")), (" AVX2", ("bf16", "bf16", "fp32")),  # no words of oneDNN's
        ("AVX512_CORE_VNNI", ("fp32", "fp32", "fp32")), ("avx512_core", ("fp32", "fp32", "fp32")),
        ("AVX2", ("fp32", "fp32", "fp32")), ("SSE41", ("fp32", "fp32", "fp32")),
    ],
)  # fmt: skip
def test_onednn_may_be_held_back(max_isa, expected):
    assert tuple(cpu_precision(FLAGS[cpu].split(), max_isa)[0] for cpu in ("AMX", "AMD", "Intel")) == expected
    assert cpu_precision(FLAGS["AVX-512"].split(), max_isa)[0] == "fp32"


def cpu_is(monkeypatch, cpu):
    monkeypatch.setattr(precision, "cpu_flags", lambda: set(FLAGS[cpu].split()))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


def test_auto_says_what_it_chose_and_why(monkeypatch, capsys):
    cpu_is(monkeypatch, "AMX")
    assert precision.decide_precision("auto", CPU) == "bf16"
    assert capsys.readouterr().out == "precision  auto is bf16: this CPU has bf16 matrix units (AMX)\n"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert precision.decide_precision("auto", CPU) == "fp32"
    assert precision.decide_precision("bf16", CPU) == "bf16"


def test_this_machines_flags_are_read():
    flags = precision.cpu_flags()
    assert flags and cpu_precision(flags)[0] in ("bf16", "fp32")


@pytest.mark.parametrize("capability, expected", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_cuda_decides_by_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.decide_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    "handed_on, flags, expected",
    [("bf16", {}, "bf16"), ("no", {"--mixed_precision": "no"}, "fp32"), ("no", {}, "bf16"), (None, {}, "bf16")],
)
def test_the_launchers_word_comes_first(monkeypatch, handed_on, flags, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if handed_on is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", handed_on)
    monkeypatch.setattr(precision, "launcher_arguments", lambda: flags)
    monkeypatch.setattr(precision, "choose", lambda device, of: "bf16")
    decide = lambda wanted="auto": precision.decide_precision(wanted, CPU)
    assert (decide(), decide("fp32"), decide("bf16")) == (expected, "fp32", "bf16")
    if handed_on == "bf16":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        with pytest.raises(ValueError, match="precision 'fp16'"):
            decide()


@pytest.mark.slow
def test_a_real_launcher_that_says_no_means_fp32(tmp_path):
    (tmp_path / "ask.py").write_text("from system.precision import launched_precision as f; print('launched', f())")
    said = []
    for flag in (["--mixed_precision", "no"], ["--mixed_precision=no"], ["--mixed_precision", "bf16"], []):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *flag, str(tmp_path / "ask.py")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_CONFIG_FILE": "", "HF_HOME": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        said += [line.split()[1] for line in done.stdout.splitlines() if line.startswith("launched")]
    assert said == ["fp32", "fp32", "bf16", "None"]


def test_a_resumed_run_keeps_its_precision(run, monkeypatch):
    cpu_is(monkeypatch, "AMX")
    code, folder = run("kept", "train.precision=auto", "train.val_every=0", stop_after=3)
    assert read_config(latest_checkpoint(folder)).train.precision == "bf16"
    cpu_is(monkeypatch, "AVX2")
    assert run("kept", "train.precision=auto")[0] == 0  # on a machine that would choose otherwise
    assert read_config(folder).train.precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run("other", "train.precision=fp32", stop_after=2)
    with pytest.raises(ValueError, match="train.precision was fp32, is bf16"):
        run("other", "train.precision=auto")


def test_all_processes_take_the_firsts_answer(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import os, torch\nfrom system import precision\n"
        "from system.processes import end_processes, start_processes\nstart_processes()\n"
        "rank = int(os.environ['RANK'])\n"
        "precision.cpu_flags = lambda: set() if rank else {'amx_bf16'}\n"
        "found = precision.decide_precision('auto', torch.device('cpu'))\n"
        "open(f'{os.path.dirname(__file__)}/said{rank}', 'w').write(found)\n"
        "end_processes()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": ""}
    done = subprocess.run([*TORCHRUN, str(tmp_path / "ask.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)] == ["bf16", "bf16"]
    assert done.stdout.count("auto is bf16") == 1


def test_sampling_records_what_auto_chose_whatever_the_batch_size(tmp_path, tiny_overrides, monkeypatch):
    folder, elsewhere = make_run(tmp_path / "run", tiny_overrides), tmp_path / "elsewhere"
    cpu_is(monkeypatch, "AMX")
    call = [f"ckpt={folder}", "seeds=0-2", "steps=2"]
    precision_in = lambda out: json.loads((out / "samples.json").read_text())["settings"]["precision"]
    sample.main(call)
    sample.main([*call, "batch_size=1", "seeds=0-3"])  # the same folder
    (out,) = (folder / "samples").iterdir()
    assert "precision-bf16" in out.name and precision_in(out) == "bf16"
    sample.main([*call, f"out={elsewhere}"])
    cpu_is(monkeypatch, "AVX2")
    sample.main([*call, f"out={elsewhere}", "seeds=0-3"])  # goes on as it began
    assert precision_in(elsewhere) == "bf16"
    sample.main(call)
    assert len(list((folder / "samples").iterdir())) == 2


def test_fp32_sampling_uses_tf32_on_cuda_alone_and_leaves_the_process_as_it_was(tmp_path, tiny_overrides):
    seen = []
    run = load_run(make_run(tmp_path / "run", tiny_overrides), device="cpu")
    run.objective = type("Asks", (), {"predict": lambda *given: seen.append(torch.get_float32_matmul_precision())})()
    x, t, y = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    run.predict(x, t, y, None)
    run.device = torch.device("cuda")
    run.predict(x, t, y, None)
    assert seen == ["highest", "high"] and torch.get_float32_matmul_precision() == "highest"
