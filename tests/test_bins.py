"""Validation in five bins of the noise level: each sample in its own, all of them the total."""

import math
import sys
from functools import partial

import pytest
import torch

import data
import train as training
from checkpoints.load import load_run
from contracts import Objective
from ddpm import DDPM
from edm import EDM
from randomness import normal, seeded_generator, uniform
from routing_module import Routing
from tests import started
from tests.conftest import ROOT, numbers

CENTRES = (0.1, 0.3, 0.5, 0.7, 0.9)
OBJECTIVES = {"edm": ["objective=edm"], "rf": ["objective=rf"], "ddpm": ["objective=ddpm", "model.learn_sigma=true"]}


def share_by_hand(name, objective, n, generator):
    """Of the first numbers that the objective draws."""
    if name == "ddpm":
        return (uniform((n,), generator) * 1000).floor() / 1000
    drawn = normal((n,), generator)
    return drawn.sigmoid() if name == "rf" else (1 + (drawn / math.sqrt(2)).erf()) / 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_sample_is_in_its_bin_and_the_bins_are_the_total(name, run, few_latents):
    settings = [*OBJECTIVES[name], "train.max_steps=2", "train.val_every=2", "train.val_samples=40"]
    _, folder = run("binned", *settings)
    line = next(line for line in numbers(folder) if "val/loss_dense" in line)
    loaded = load_run(folder, "ema", device="cpu")
    latents = data.open_latents(few_latents)
    raw, condition = latents.read(range(40))
    for mode in ("dense", "routed"):
        generator, same = (seeded_generator(0, "val", 0) for _ in range(2))
        x = latents.to_model_input(raw, generator)
        latents.to_model_input(raw, same)
        routing = Routing(generators=generator) if mode == "routed" else None
        net = partial(loaded.model, routing=routing)
        with torch.no_grad():
            losses = loaded.objective.errors(net, x, condition, generator)[0].flatten(1).mean(dim=1)
        total = line[f"val/loss_{mode}"]
        assert total == pytest.approx(losses.mean().item(), rel=1e-5)
        bins = (share_by_hand(name, loaded.objective, 40, same) * 5).floor().clamp(max=4)
        counts = [int((bins == i).sum()) for i in range(5)]
        means = [line.get(f"val/loss_{mode}/{centre}") for centre in CENTRES]
        for i, (mean, count) in enumerate(zip(means, counts)):
            assert (mean is None) == (count == 0)
            assert mean is None or mean == pytest.approx(losses[bins == i].mean().item(), rel=1e-5)
        assert sum(mean * count for mean, count in zip(means, counts) if count) / 40 == pytest.approx(total, rel=1e-6)
        assert len({*means}) == 5


def test_two_processes_fill_the_bins_of_one(run, few_latents, tiny_overrides, tmp_path, monkeypatch):
    """Chunks of 8 samples, the last of 2, on one process or two: the same numbers are added, in another order."""
    monkeypatch.setattr(training, "VAL_BATCH", 8)
    settings = ["train.max_steps=1", "train.val_every=1", "train.val_samples=42", "objective=rf"]
    one = numbers(run("one", *settings)[1])
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport train\nfrom tests.made_runs import made_settings\n"
        "train.VAL_BATCH = 8\ncode = train.train(made_settings(sys.argv[2:]))\n"
        "from system.processes import end_processes\nend_processes()\nsys.exit(code)\n"  # as train.py leaves
    )
    command = [sys.executable, str(script), str(ROOT), *tiny_overrides, *settings]
    done = started.run([*command, f"results_dir={tmp_path}", "run_name=two"], processes=2)
    assert done.returncode == 0, done.stderr
    two = numbers(tmp_path / "two")
    assert sum("/loss_dense/" in name for name in two[1]) == 5 and len(one) == len(two) == 2
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    assert "loss_dense " in done.stdout and "loss_dense/0.1" not in done.stdout


def test_an_objective_without_a_scale_has_no_bins(run, monkeypatch):
    monkeypatch.setattr(EDM, "noise_share", Objective.noise_share)
    line = numbers(run("plain", "train.max_steps=1", "train.val_every=1")[1])[-1]
    assert {name for name in line if name.startswith("val/")} == {"val/loss_dense", "val/loss_routed"}


def test_the_scales_ends():
    sigma = torch.tensor([1e-4, math.exp(-1.2), 1e4])
    torch.testing.assert_close(EDM().noise_share(sigma.log() / 4), torch.tensor([0.0, 0.5, 1.0]), atol=1e-6, rtol=0)
    ddpm = DDPM()
    steps = ddpm.step_at(ddpm.log_sigma.exp())
    assert torch.equal((ddpm.noise_share(steps) * 5).long(), torch.arange(1000) // 200)
