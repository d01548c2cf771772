"""scripts/guidance_grid.py and show_routes.py on a small run of random weights."""

import json

import pytest
import torch
from PIL import Image

import routing_module
import sample
from checkpoints.load import load_run
from guidance import Guidance
from scripts import guidance_grid, show_routes
from tests.made_runs import make_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    overrides = ["objective=rf", "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "sampler.num_steps=2"]
    return make_run(tmp_path_factory.mktemp("runs") / "digits", overrides)


def test_picture_has_a_row_a_method_and_scale(run_folder, tmp_path, capsys):
    guidance_grid.main(["picture", f"ckpt={run_folder}", "seeds=0-3", "scales=[2.0]", f"out={tmp_path}"])
    said = capsys.readouterr().out
    assert said.count("GMACs") == 6 and "none: 2 calls" in said and "CFG, scale 2: 4 calls" in said
    with Image.open(tmp_path / "grid.png") as image:
        assert min(image.size) > 100


def test_table_scores_each_row_over_several_sets_of_seeds(run_folder, digits, tmp_path, capsys):
    call = ["table", f"ckpt={run_folder}", "scales=[2.0]", "n=20", "repeats=2", f"digits={digits}", f"out={tmp_path}"]
    guidance_grid.main(call)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", *guidance_grid.METHODS]
    none, cfg, _, sparse, cheap, both = rows
    assert cfg["gmacs_per_image"] == pytest.approx(2 * none["gmacs_per_image"])
    assert cheap["gmacs_per_image"] < sparse["gmacs_per_image"] == both["gmacs_per_image"] < cfg["gmacs_per_image"]
    assert all(len(set(row["fd_mnist"])) == 2 and 0 <= min(row["class_accuracy"]) <= 1 for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n") == 8 and f"{sum(none['fd_mnist']) / 2:.2f} ±" in table
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.safetensors"))
    guidance_grid.main(call)  # what was scored is read back
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.safetensors")) == before
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == rows


def test_map_covers_the_pairs_with_strong_below_weak(run_folder, digits, tmp_path):
    call = ["map", f"ckpt={run_folder}", "gammas=[0.0,0.4,0.8]", "n=20", f"digits={digits}", f"out={tmp_path}"]
    guidance_grid.main(call)
    values = torch.tensor(json.loads((tmp_path / "map.json").read_text())["fd_mnist"])
    assert torch.equal(values > 0, torch.ones(3, 3).triu(1).bool()) and (tmp_path / "map.png").is_file()


def test_routes_shown_are_those_that_sampling_draws(run_folder, tmp_path, monkeypatch):
    show_routes.main([f"ckpt={run_folder}", "seeds=0-1", f"out={tmp_path / 'routes.png'}"])
    with Image.open(tmp_path / "routes.png") as image:
        assert min(image.size) > 100
    run, drawn = load_run(run_folder), []

    def record(*inputs, **settings):
        drawn.append(draw(*inputs, **settings))
        return drawn[-1]

    draw = routing_module.draw_keep_ids
    monkeypatch.setattr(routing_module, "draw_keep_ids", record)
    next(sample.generate(run, Guidance(gamma_strong=0.5), [0, 1], torch.tensor([0, 1])))
    for step, keep_ids in enumerate(list(drawn)):
        (mask,) = show_routes.kept_tokens(run, [0, 1], 0.5, step)
        assert torch.equal(mask.nonzero()[:, 1].view(2, -1), keep_ids)
    passes = show_routes.through_blocks(run, [mask])
    assert (
        passes[:, :2].all() and passes[:, 3:].all() and torch.equal(passes[:, 2], mask)
    )  # 6 blocks: the route is 2..2


def test_a_run_without_routes_has_none_to_show(tmp_path_factory):
    small = ["model=dit", "model.depth=2", "model.hidden_size=32", "model.num_heads=2"]
    folder = make_run(tmp_path_factory.mktemp("runs") / "dense", small)
    with pytest.raises(ValueError, match="no routes"):
        show_routes.main([f"ckpt={folder}"])
