"""precision=auto: who decides, by what, and that all processes and a resumed run keep to it."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from omegaconf import OmegaConf

import sample
from checkpoints.load import load_run
from checkpoints.run_folder import latest_checkpoint, read_config
from dit import DiT
from lightningdit import LightningDiT
from maskdit import MaskDiT
from routing_module import Routing
from scripts.bench import OpCounter
from sprint import Sprint
from system import precision
from tests.conftest import ROOT, TORCHRUN
from tests.made_runs import make_run

CPU = torch.device("cpu")
SOME = Counter({(1, 64, 32, 96): 2, (8, 16, 8, 16): 1})
ROUTES = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=-2)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tread" / "precision"


def decide(wanted="auto", device=CPU, products=SOME, backward=True):
    return precision.decide_precision(wanted, device, lambda: products, backward=backward)


def made(monkeypatch, **seconds):
    monkeypatch.setattr(precision, "measure", lambda products, backward: dict(seconds))


@pytest.mark.parametrize("network", [DiT, LightningDiT, Sprint, MaskDiT])
@pytest.mark.parametrize("routed", [False, True])
def test_the_products_are_those_of_a_pass(network, routed):
    routes = {"routes": ROUTES} if network in (DiT, LightningDiT) else {}
    net = network(8, 2, 3, hidden_size=32, depth=6, num_heads=2, num_classes=5, size="DiT-XS/2", **routes)
    routing = Routing(generators=torch.Generator().manual_seed(0)) if routed else None
    with torch.no_grad(), OpCounter() as counter:
        net(torch.randn(3, 3, 8, 8), torch.rand(3), torch.zeros(3, dtype=torch.int64), routing=routing)
    seen = Counter()
    for (_, ((a, _), (b, _))), count in counter.products.items():
        seen[(1, *a, b[-1]) if len(a) == 2 else (*a, b[-1])] += count
    assert not net.products(3, routing) - seen
    assert sum((seen - net.products(3, routing)).values()) <= 7  # embeddings, the final layer, SPRINT's and MaskDiT's


def test_the_faster_is_chosen_and_both_figures_are_printed_once(cache, monkeypatch, capsys):
    made(monkeypatch, fp32=0.02, bf16=0.01)
    assert decide() == "bf16"
    assert "auto is bf16: matrix products, forward and backward: fp32 20 ms, bf16 10 ms" in capsys.readouterr().out
    made(monkeypatch, fp32=0.01, bf16=0.02)
    assert decide() == "bf16"  # kept
    assert decide(products=SOME + SOME) == decide(backward=False) == "fp32"  # other shapes, other work: measured anew
    monkeypatch.setattr(torch, "__version__", "another")
    assert decide() == "fp32"
    assert len(list(cache.iterdir())) == 4


def test_a_cache_that_is_damaged_or_cannot_be_written_does_no_harm(cache, monkeypatch):
    made(monkeypatch, fp32=0.02, bf16=0.01)
    decide()
    (kept,) = cache.iterdir()
    kept.write_text('{"fp32": ')
    assert decide() == "bf16" and json.loads(kept.read_text()) == {"fp32": 0.02, "bf16": 0.01}
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    assert decide() == "bf16"


def test_measuring_is_short_and_ranks_a_slow_precision_last(monkeypatch):
    with torch.device("meta"):
        net = DiT(size="DiT-B/2", routes=ROUTES)
    started = time.process_time()
    seconds = precision.measure(net.products(16) + net.products(16, Routing()), backward=True)
    assert time.process_time() - started < 3 * torch.get_num_threads() and min(seconds.values()) > 0
    pass_of = precision.pass_of

    def slow_bf16(product, dtype, backward):
        work = pass_of(product, dtype, backward)
        return (lambda: [work() for _ in range(20)]) if dtype == torch.bfloat16 else work

    monkeypatch.setattr(precision, "pass_of", slow_bf16)
    seconds = precision.measure(Counter({(1, 512, 512, 512): 1}), backward=True)
    assert seconds["fp32"] < seconds["bf16"]


def test_large_products_are_measured_on_fewer_rows_and_count_for_all():
    products = Counter({(1, 2**20, 512, 512): 3, (64, 256, 64, 256): 2, (1, 8, 8, 8): 1})
    scaled = precision.within(products)
    for pairs, rows, inner, columns in scaled:
        assert pairs * rows * inner * columns <= precision.LARGEST
    work = lambda some: sum(n * p[0] * p[1] * p[2] * p[3] for p, n in some.items())
    assert work(scaled) == pytest.approx(work(products)) and scaled[1, 8, 8, 8] == 1


@pytest.mark.parametrize("capability, expected", [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_cuda_decides_by_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert decide(device=torch.device("cuda")) == expected


@pytest.mark.parametrize(
    "handed_on, flags, expected",
    [("bf16", {}, "bf16"), ("no", {"--mixed_precision": "no"}, "fp32"), ("no", {}, "measured"), (None, {}, "measured")],
)
def test_the_launchers_word_comes_first(cache, monkeypatch, handed_on, flags, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if handed_on is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", handed_on)
    monkeypatch.setattr(precision, "launcher_arguments", lambda: flags)
    monkeypatch.setattr(precision, "choose", lambda *given: "measured")
    assert decide() == expected and decide("bf16") == "bf16"
    if handed_on == "bf16":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        with pytest.raises(ValueError, match="precision 'fp16'"):
            decide()


def test_a_real_launcher_that_says_no_means_fp32(tmp_path):
    (tmp_path / "ask.py").write_text("from system.precision import launched_precision as f; print('launched', f())")
    said = []
    for flag in (["--mixed_precision", "no"], ["--mixed_precision=no"], ["--mixed_precision", "bf16"], []):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *flag, str(tmp_path / "ask.py")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_CONFIG_FILE": "", "HF_HOME": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        said += [line.split()[1] for line in done.stdout.splitlines() if line.startswith("launched")]
    assert said == ["fp32", "fp32", "bf16", "None"]


def test_a_resumed_run_keeps_its_precision(cache, run, monkeypatch):
    made(monkeypatch, fp32=0.02, bf16=0.01)
    code, folder = run("kept", "train.precision=auto", "train.val_every=0", stop_after=3)
    assert read_config(latest_checkpoint(folder)).train.precision == "bf16"
    made(monkeypatch, fp32=0.01, bf16=0.02)
    for kept in cache.iterdir():
        kept.unlink()
    assert run("kept", "train.precision=auto")[0] == 0  # on a machine that would choose otherwise
    assert OmegaConf.load(folder / "config.yaml").train.precision == "bf16"
    assert not list(cache.iterdir())  # and does not measure
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run("other", "train.precision=fp32", stop_after=2)
    with pytest.raises(ValueError, match="train.precision was fp32, is bf16"):
        run("other", "train.precision=auto")


def test_all_processes_take_the_firsts_answer(tmp_path):
    (tmp_path / "ask.py").write_text(
        "import os, torch\nfrom collections import Counter\nfrom system import precision\n"
        "from system.processes import end_processes, start_processes\nstart_processes()\n"
        "rank = int(os.environ['RANK'])\n"
        "precision.measure = lambda *given: {'fp32': 2.0, 'bf16': 1.0 + 2 * rank}\n"
        "found = precision.decide_precision('auto', torch.device('cpu'), Counter, backward=True)\n"
        "open(f'{os.path.dirname(__file__)}/said{rank}', 'w').write(found)\n"
        "end_processes()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([*TORCHRUN, str(tmp_path / "ask.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)] == ["bf16", "bf16"]
    assert done.stdout.count("auto is bf16") == 1


def test_sampling_records_what_auto_chose_whatever_the_batch_size(cache, tmp_path, tiny_overrides, monkeypatch):
    folder = make_run(tmp_path / "run", tiny_overrides)
    made(monkeypatch, fp32=0.02, bf16=0.01)
    call = [f"ckpt={folder}", "seeds=0-2", "steps=2"]
    sample.main(call)
    made(monkeypatch, fp32=0.01, bf16=0.02)
    sample.main([*call, "batch_size=1", "seeds=0-3"])  # the same folder, not measured again
    (out,) = (folder / "samples").iterdir()
    assert out.name.endswith("-bf16")
    assert json.loads((out / "samples.json").read_text())["settings"]["precision"] == "bf16"
    sample.main([*call, "precision=fp32"])
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
