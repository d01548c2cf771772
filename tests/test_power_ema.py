"""Power-function averages: their formulas, what a run keeps of them, any width afterwards."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import export
import fid
import train as training
from checkpoints.load import load_run
from checkpoints.run_folder import (
    checkpoint_tensors,
    complete_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_tensors,
    verify_checkpoint,
    write_checkpoint,
)
from evaluation import table
from tests.conftest import assert_same_run
from tests.made_runs import made_settings
from training.ema import beta, coefficients, gamma_of, inner_product, reconstruct, update_averages, update_ema
from training.stopping import EXIT_START_AGAIN

WIDTHS, WEIGHT = (0.05, 0.1), "blocks.0.attn.proj.weight"


@pytest.mark.parametrize("width", [0.003, 0.05, 0.1, 0.2, 0.2799])
def test_gamma_is_the_largest_root_and_its_profile_has_the_width(width):
    gamma = gamma_of(width)
    terms = [gamma**3, 7 * gamma**2, (16 - width**-2) * gamma, 12 - width**-2]
    assert abs(sum(terms)) < 1e-12 * sum(map(abs, terms)) and gamma > 0
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(width, rel=1e-12)  # Eq. 123
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)  # of i / t under the density i^gamma
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", WIDTHS)
def test_beta_makes_the_power_profile(width):
    """Step i's part of the average at step t is (i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1)."""
    exponent, parts = gamma_of(width) + 1, np.zeros(0)
    for step in range(1, 41):
        assert beta(width, step) == pytest.approx((1 - 1 / step) ** exponent, rel=1e-12, abs=0)
        parts = np.append(parts * beta(width, step), 1 - beta(width, step))
    edges = (np.arange(41) / 40) ** exponent
    np.testing.assert_allclose(parts, np.diff(edges), rtol=1e-11, atol=1e-18)


@pytest.mark.parametrize("a, b", [((900, 0.05), (1000, 0.1)), ((1000, 0.07), (400, 0.05)), ((300, 0.2), (300, 0.1))])
def test_inner_products_are_those_of_the_profiles(a, b):
    density = lambda i, t, width: (gamma_of(width) + 1) * np.where(i <= t, i / t, 0) ** gamma_of(width) / t
    i = (np.arange(10**6) + 0.5) / 10**6 * min(a[0], b[0])
    integral = (density(i, *a) * density(i, *b)).mean() * min(a[0], b[0])
    assert inner_product(a[0], gamma_of(a[1]), b[0], gamma_of(b[1])) == pytest.approx(integral, rel=1e-6)


def test_the_mix_is_the_nearest_to_the_wanted_profile():
    steps, widths = [100, 100, 300, 300, 400, 400], WIDTHS * 3
    mix, error = coefficients(steps, widths, 400, 0.07)
    assert mix.sum() == pytest.approx(1) and 0 < error < 0.1
    grid = (np.arange(20000) + 0.5) / 20000 * 400
    profile = lambda t, width: (gamma_of(width) + 1) * np.where(grid <= t, grid / t, 0) ** gamma_of(width) / t
    basis, wanted = np.stack([profile(*s) for s in zip(steps, widths)], axis=1), profile(400, 0.07)
    nearest = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    np.testing.assert_allclose(mix, nearest / nearest.sum(), atol=2e-3)
    assert error == pytest.approx(np.linalg.norm(basis @ mix - wanted) / np.linalg.norm(wanted), rel=0.02)
    exact, none = coefficients(steps, widths, 400, 0.1)
    np.testing.assert_allclose(exact, [0, 0, 0, 0, 0, 1], atol=1e-9)
    assert none < 1e-6


STEPS, SAVES, EXPONENTS = 3000, 20, (0.0, 0.5, 1.0, 2.0)


def known_run(folder, keep_last):
    """A run whose four weights are known functions of the step: (step / STEPS)^exponent. -> the last checkpoint."""
    model = nn.Linear(4, 1, bias=False)
    averages = {f"power_{width}": nn.Linear(4, 1, bias=False) for width in WIDTHS}
    optimizer = torch.optim.SGD(model.parameters())
    for step in range(1, STEPS + 1):
        weights = torch.tensor([[(step / STEPS) ** exponent for exponent in EXPONENTS]])
        model.weight.data.copy_(weights)
        update_averages(averages, model, step, ema_decay=0.9, ema_ramp=False)
        if step % (STEPS // SAVES) == 0:
            tensors = checkpoint_tensors({"model": model, "ema": model, **averages}, optimizer)
            path = write_checkpoint(folder, step, tensors, {}, "a: 1\n")
            prune_checkpoints(folder, keep_last, None)
    return path


@pytest.mark.parametrize("keep_last, tolerance", [(SAVES, 1e-3), (1, 1e-3)])  # all in float32; all but one in float16
def test_any_width_of_weights_that_are_known_functions_of_time(tmp_path, keep_last, tolerance, capsys):
    path = known_run(tmp_path, keep_last)
    assert len(complete_checkpoints(tmp_path)) == keep_last
    assert len(list(tmp_path.glob("snapshots/*"))) == SAVES - keep_last
    for width in (0.03, 0.05, 0.07, 0.1, 0.12, 0.15):
        (found,) = reconstruct(path, width).values()
        gamma = gamma_of(width)
        expected = [(gamma + 1) / (gamma + 1 + exponent) for exponent in EXPONENTS]
        assert found[0].tolist() == pytest.approx(expected, rel=tolerance), width
    assert not capsys.readouterr().err
    reconstruct(path, 0.005)
    assert "warning: ema_width=0.005: 20 snapshots come within" in capsys.readouterr().err


def test_at_a_stored_width_it_is_the_stored_snapshot(tmp_path):
    path = known_run(tmp_path, 2)
    for checkpoint in complete_checkpoints(tmp_path):
        for width in WIDTHS:
            (found,), (stored,) = (
                reconstruct(checkpoint, width).values(),
                read_tensors(checkpoint / f"power_{width:g}.safetensors").values(),
            )
            assert torch.equal(found, stored)
    for snapshot in tmp_path.glob("snapshots/*"):
        verify_checkpoint(snapshot)
    damaged = sorted(tmp_path.glob("snapshots/*/power_0.05.safetensors"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    reconstruct(path, 0.05)
    with pytest.raises(ValueError, match="does not match its sha256"):
        reconstruct(path, 0.07)


def test_an_average_that_cannot_be_kept_keeps_its_checkpoint(tmp_path, capsys):
    (tmp_path / "snapshots").write_text("in the way")
    known_run(tmp_path, 3)
    assert len(complete_checkpoints(tmp_path)) == SAVES
    assert "is not deleted, for its averages cannot be kept" in capsys.readouterr().err


def test_training_keeps_the_averages_and_resumes_to_the_bit(run):
    power = ["ema=power", "train.save_every=1", "train.keep_last=2"]
    code, golden = run("golden", *power)
    assert code == 0 and sorted(p.name for p in golden.glob("snapshots/*")) == [f"step_000000{i}" for i in range(1, 6)]
    _, fixed = run("fixed", "train.save_every=1")  # the same run without averages, and with all its weights
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (latest_checkpoint(golden) / name).read_bytes() == (latest_checkpoint(fixed) / name).read_bytes()
    for width in WIDTHS:
        average = nn.ParameterList([torch.zeros(32, 32)])
        for step, path in enumerate(complete_checkpoints(fixed), 1):
            update_ema(average, nn.ParameterList([read_tensors(path / "model.safetensors")[WEIGHT]]), beta(width, step))
        assert torch.equal(read_tensors(latest_checkpoint(golden) / f"power_{width:g}.safetensors")[WEIGHT], average[0])

    assert run("cut", *power, stop_after=4)[0] == EXIT_START_AGAIN
    cut = golden.with_name("cut")
    # Of a future that a resume from an earlier checkpoint gave up.
    shutil.copytree(cut / "snapshots" / "step_0000002", cut / "snapshots" / "step_0000009")
    run("cut", *power)
    assert_same_run(golden, cut)
    files = [
        {
            p.relative_to(folder): p.read_bytes()
            for part in ("snapshots", "checkpoints/step_*")
            for p in folder.glob(f"{part}/**/power_*")
        }
        for folder in (golden, cut)
    ]
    assert files[0] == files[1] and len(list(cut.glob("checkpoints/abandoned_*/snapshot_step_0000009"))) == 1


def test_a_run_without_averages_is_not_resumed_with_them(run):
    run("late", stop_after=2)
    with pytest.raises(ValueError, match="another run: ema.widths was None"):
        run("late", "ema=power")
    with pytest.raises(ValueError, match="has no power_0.05.safetensors; needed: a run that has had it from its first"):
        run("late", "ema=power", "resume_allow=[ema]")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, digits):
    """A run of digits with power averages at four steps, two of them pruned."""
    root = tmp_path_factory.mktemp("runs")
    overrides = [
        "ema=power", "run_name=averaged", f"results_dir={root}", f"data.path={digits}", "sampler.num_steps=2",
        "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.max_steps=8", "train.global_batch_size=8",
        "train.warmup_steps=0", "train.decay_steps=0", "train.compile=off", "train.precision=fp32", "preview.every=0",
        "train.save_every=2", "train.val_every=0", "train.keep_last=2",
    ]  # fmt: skip
    assert training.train(made_settings(overrides)) == 0
    return root / "averaged"


def test_scores_against_width(averaged, digits, tmp_path, capsys):
    settings = [f"digits={digits}", "seeds=0-11", "steps=1", "metrics=[fd]", f"out={tmp_path}"]
    fid.main(["calc", f"ckpt={averaged}", *settings, "ema_width=null,0.05,0.07,0.12"])
    header, *rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert header.startswith("run,step,weights,ema_width,guidance,n,fd_mnist")
    assert [row.split(",")[3] for row in rows] == ["", "0.05", "0.07", "0.12"]
    assert len({row.split(",")[6] for row in rows}) == 4  # four networks
    names = sorted(path.parent.name for path in tmp_path.glob("*/metrics.json"))
    own, *widths = (name.split("_steps-1")[1] for name in names)
    assert own == "" and widths == [f"_ema_width-{width}" for width in (0.05, 0.07, 0.12)]
    values = [json.loads((tmp_path / name / "metrics.json").read_text()).get("ema_width") for name in names]
    assert values == [None, 0.05, 0.07, 0.12]
    assert Image.open(tmp_path / "widths.png").size[0] > 400 and not (tmp_path / "scores.png").exists()


def test_an_export_is_the_average_of_its_width(averaged, tmp_path):
    export.main([f"ckpt={averaged}", "ema_width=0.07", f"out={tmp_path / 'exported'}"])
    exported = load_run(tmp_path / "exported", device="cpu").model.state_dict()
    expected = reconstruct(latest_checkpoint(averaged), 0.07)
    own = load_run(averaged, device="cpu").model.state_dict()
    assert all(torch.equal(exported[name], expected[name]) for name in own) and exported.keys() == expected.keys()
    assert not torch.equal(exported[WEIGHT], own[WEIGHT])
    assert "| ema_width | 0.07 |" in (tmp_path / "exported" / "README.md").read_text()
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["ema_width"] == 0.07
    earlier = complete_checkpoints(averaged)[0]  # step 6, of which snapshots of steps 2 and 4 are left
    assert not torch.equal(reconstruct(earlier, 0.07)[WEIGHT], expected[WEIGHT])


def test_raw_weights_have_no_width(averaged, tmp_path):
    with pytest.raises(ValueError, match="ema_width=0.07 is an average; needed: weights=ema, got weights=raw"):
        export.main([f"ckpt={averaged}", "ema_width=0.07", "weights=raw", f"out={tmp_path / 'x'}"])


def test_a_plot_of_widths_has_a_line_for_each_step_and_a_level_for_the_ema(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure.axes[0]))
    about = {"run": "a", "weights": "ema", "guidance": "cfg2"}
    rows = [
        about | {"step": step, "fd_mnist": step * (1 + (width or 0))} | ({"ema_width": width} if width else {})
        for step in (100, 200)
        for width in (0.1, None, 0.05)
    ]
    for axis, found in (("ema_width", [0.05, 0.1]), ("step", [100, 200])):
        table.plot(rows, "fd_mnist", axis, tmp_path / "plot.png")
        lines = {line.get_label(): list(line.get_xdata()) for line in drawn[-1].lines}
        sloped = {label: x for label, x in lines.items() if x != [0, 1]}  # a level runs from edge to edge
        assert list(sloped.values()) == [found] * len(sloped) and drawn[-1].get_ylabel() == "fd_mnist ↓"
    assert set(lines) == {"a ema cfg2 0.1", "a ema cfg2", "a ema cfg2 0.05"}
    of_widths = {line.get_label(): list(line.get_ydata()) for line in drawn[0].lines}
    assert of_widths["a ema cfg2 100"] == pytest.approx([105, 110])
    assert of_widths["a ema cfg2 200, own EMA"] == [200, 200] and len(of_widths) == 4
