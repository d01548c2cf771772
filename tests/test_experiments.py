"""Every row of the paper's tables is one command, and each of them starts."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import conditions
import cost
import train as training
from checkpoints.config import Settings
from checkpoints.load import build_network
from routing_module import Routing
from system import cli
from system.processes import start_processes
from system.settings import parse
from tests import started
from training.prepare import build_state

SIZES = {"S": 12, "B": 12, "L": 24, "XL": 28}
PUBLISHED = {f"{model} {size}/2": f"{overrides} model.size=DiT-{size}/2" for model, overrides in {
    "DiT": "experiment=imagenet256 model=dit objective=ddpm",
    "DiT + TREAD": "experiment=imagenet256 model=tread",
    "SiT": "experiment=imagenet256 model=dit objective=rf objective.timesteps=uniform",
    "SiT + TREAD": "experiment=imagenet256 model=tread objective=rf objective.timesteps=uniform",
}.items() for size in SIZES}  # fmt: skip
ROWS = PUBLISHED | {
    "LightningDiT XL/1": "experiment=lightningdit model=lightningdit",
    "LightningDiT XL/1 + TREAD": "experiment=lightningdit",
    "DiT + TREAD, 160 epochs": "experiment=imagenet256 train.max_steps=800000",
    "DiT + TREAD, 680 epochs": "experiment=imagenet256 train.max_steps=3400000",
    "DiT + TREAD (F)": "experiment=finetune init_from=null",
}
OTHER_METHODS = {
    "SPRINT": "experiment=sprint",
    "SPRINT, second stage": "experiment=sprint_finetune init_from=null",
    "MaskDiT": "experiment=maskdit",
    "MaskDiT, unmasked": "experiment=maskdit_finetune init_from=null",
}
COCO = {"DiT B/2 on texts": "experiment=coco256 model=dit", "DiT + TREAD B/2 on texts": "experiment=coco256"}
SMALL = ["model.depth=6", "model.hidden_size=64", "model.num_heads=2", "train.global_batch_size=2"]


@functools.cache
def settings_of(row, *overrides):
    return parse(
        Settings, cli.load_config("config", [*(ROWS | OTHER_METHODS | COCO).get(row, row).split(), *overrides])
    )


@functools.cache
def network(row):
    with torch.device("meta"):
        return build_network(settings_of(row))


MODELS = sorted(path.stem for path in (cli.CONFIG_DIR / "model").glob("*.yaml"))


@pytest.mark.parametrize("row", [*ROWS, *COCO])
def test_each_row_dry_runs(row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "open_data", None)  # no data is asked for
    overrides = [*SMALL, "train.dry_run=true", f"results_dir={tmp_path}", "run_name=dry"]
    assert training.train(settings_of(row, *overrides)) == 0
    out = capsys.readouterr().out
    assert "GPU-hours" in out and "dry run    one step" in out and "nan" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_the_papers_setting(row):
    settings, model = settings_of(row), network(row)
    size = row.split("/")[0].split()[-1]
    assert len(model.blocks) == SIZES.get(size, 28)
    routes = [(r.selection_ratio, r.start_layer_idx, r.end_layer_idx) for r in model.routes]
    assert routes == ([(0.5, 2, len(model.blocks) - 4)] if "TREAD" in row and "(F)" not in row else [])
    assert model.num_tokens == 256 and model.num_classes == 1000
    train = settings.train
    expected = (80000, 1024, 2e-4) if "Lightning" in row else (400000, 256, 1e-4)
    if row in PUBLISHED or "Lightning" in row:
        assert (train.max_steps, train.global_batch_size, train.lr) == expected
    assert (train.ema_decay, train.label_dropout, train.decay_steps, settings.optimizer.weight_decay) == (
        0.9999,
        0.1,
        0,
        0,
    )
    assert train.grad_clip is None
    assert settings.objective.get("cosine", 0.0) == (1.0 if "Lightning" in row else 0.0)
    learned = settings.objective["_target_"] == "ddpm.DDPM"
    assert (settings.model["learn_sigma"], model.out_channels == 2 * model.latent_shape[0]) == (learned, learned)
    if settings.objective["_target_"] == "edm.EDM":
        assert [settings.objective[key] for key in ("P_mean", "P_std", "sigma_data")] == [-1.2, 1.2, 0.5]
    epochs = {"160 epochs": 160, "680 epochs": 680, "(F)": 60}
    for name, number in epochs.items():
        if row.endswith(name):
            assert train.max_steps * 256 / 1_281_167 == pytest.approx(number, rel=2e-3)


@pytest.mark.parametrize("model", MODELS)
def test_multiply_adds_are_those_that_torch_counts(model):
    """On fake tensors: shapes only. On CPUs attention is matrix products, and so is counted."""
    settings = settings_of(f"data=imagenet256 model={model} model.size=DiT-B/2")
    with FakeTensorMode():
        net = build_network(settings)
        x, t = torch.empty(2, *net.latent_shape), torch.empty(2)
        for routing in (None, Routing()):
            with FlopCounterMode(display=False) as counter:
                net(x, t, conditions.repeat(net.null_condition, 2, "cpu"), routing=routing)
            assert counter.get_total_flops() / 4 == pytest.approx(net.macs(routing), rel=0.01)


def test_finetuning_is_dense_slow_and_from_the_routed_run():
    settings = settings_of("experiment=finetune results_dir=runs data.path=x")
    assert settings.train.lr == 1e-5 and settings.init_from == "runs/imagenet256-tread-XL2-edm"
    assert not settings.model["routes"]
    with pytest.raises(ValueError, match="tread-XL2-edm"):  # which is not there: nothing starts from scratch
        build_state(settings, start_processes(), new=True)


def test_a_dry_run_from_the_command_line(tmp_path):
    root = Path(training.__file__).parent
    overrides = [*ROWS["DiT + TREAD XL/2"].split(), *SMALL, "train.dry_run=true", f"results_dir={tmp_path}"]
    done = started.run([sys.executable, "train.py", *overrides], cwd=root)
    assert done.returncode == 0 and "dry run" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_routing_saves_gpu_hours_as_predicted():
    hours = {}
    for row in ("DiT XL/2", "DiT + TREAD XL/2"):
        hours[row] = cost.gpu_hours(network(row).macs(Routing()), settings_of(row))
    assert hours["DiT + TREAD XL/2"] / hours["DiT XL/2"] == pytest.approx(0.5828, abs=5e-4)


def test_the_documented_rows_are_these_and_cost_as_predicted():
    """docs/training.md: a line for each row, or for its four sizes, with the GPU-hours that cost.py counts."""
    page = (Path(training.__file__).parent / "docs" / "training.md").read_text()
    lines = re.findall(r"^\| [^|]+ \| `(experiment=[^`]+)` \|[^|]*\| ([\d. /]+) \|$", page, re.MULTILINE)
    found = {}
    for overrides, hours in lines:
        overrides = re.sub("<[^>]+>", "null", overrides)
        values = [float(value) for value in hours.split("/")]
        sizes = [f" model.size=DiT-{size}/2" for size in SIZES] if len(values) > 1 else [""]
        found |= {overrides + size: value for size, value in zip(sizes, values, strict=True)}
    documented = ROWS | OTHER_METHODS | COCO
    assert found.keys() == set(documented.values())
    for row, overrides in documented.items():
        hours = cost.gpu_hours(network(row).macs(Routing()), settings_of(row))
        assert hours == pytest.approx(found[overrides], rel=0.01), row
