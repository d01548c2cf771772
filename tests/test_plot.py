"""scripts/plot.py: what it reads of a run, and the two pictures."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from evaluation.drawing import canvas, logarithmic, styles
from scripts import plot
from system import UserError
from tests import started


@pytest.fixture
def runs(tmp_path):
    """Two runs: the second one trains twice as fast, and has no previews."""
    for name, step_s in (("a", 0.5), ("b", 0.25)):
        run, lines = tmp_path / "runs" / name, []
        for step in range(10, 101, 10):
            values = {"train/loss": 10 / step, "train/grad_norm": None if step == 20 else 1.0, "train/lr": 1e-3}
            lines.append({"step": step, **values, "perf/step_s": step_s, "perf/img_per_s": 16 / step_s})
        lines.insert(5, {"step": 50, "val/loss_dense": 0.5, "val/loss_routed": 0.6})
        for step in (50, 100):
            result = {"step": step, "fd_mnist": 1000 / step, "kid": -0.1, "kid_std": 0.1, "n": 100}
            (run / "eval" / f"{step:07d}-fd_mnist-cfg2").mkdir(parents=True)
            (run / "eval" / f"{step:07d}-fd_mnist-cfg2" / "metrics.json").write_text(json.dumps(result))
        (run / "eval" / "0000100-fd_mnist-once").mkdir()
        (run / "eval" / "0000100-fd_mnist-once" / "metrics.json").write_text('{"step": 100, "fd_mnist": 1.0}')
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.parent / "a" / "samples" / "step_0000100-cfg2").mkdir(parents=True)  # by sample.py
    for step in range(10, 101, 10):
        Image.new("RGB", (302, 122)).save(run.parent / "a" / "samples" / f"step_{step:07d}.png")
    return run.parent


@pytest.mark.parametrize("x, unit", [("step", 1), ("seconds", 0.25), ("images", 16)])
def test_curves_are_those_of_the_log_and_the_scores(runs, x, unit):
    curves = plot.read_curves(runs / "b", x)
    scores = ["fd_mnist\nfd_mnist-cfg2", "kid\nfd_mnist-cfg2"]  # at two steps; kid_std is no score
    assert list(curves) == [*plot.PANELS, *scores]
    steps = np.arange(10, 101, 10)
    np.testing.assert_allclose(curves["train/loss"], (steps * unit, 10 / steps))
    assert len(curves["train/grad_norm"][0]) == 9
    np.testing.assert_allclose(curves["val/loss_dense"], ([50 * unit], [0.5]))
    np.testing.assert_allclose(curves[scores[0]], ([50 * unit, 100 * unit], [20, 10]))


def command(*arguments):
    return started.run([sys.executable, "scripts/plot.py", *arguments])


def test_the_pictures_of_two_runs(runs):
    done = command(runs / "a", runs / "b", "x=seconds")
    assert done.stdout.split() == [str(runs / "curves.png"), str(runs / "previews.png")], done.stderr
    assert Image.open(runs / "curves.png").width == 13 * 120
    assert plot.previews(runs / "b") == {} and len(plot.previews(runs / "a")) == 10
    done = command(runs / "b", f"out={runs / 'new'}")
    assert done.stdout.split() == [str(runs / "new" / "curves.png")], done.stderr


def test_lines_are_apart_in_grey_and_the_sheet_ends_with_the_last_step(runs, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: drawn.append(figure))
    monkeypatch.setattr(plot, "save_grid", lambda *sheet: drawn.append(sheet))
    plot.main([str(runs / "a"), str(runs / "b")])
    curves, (images, _, columns, labels) = drawn
    for axis in curves.axes[: len(plot.PANELS)]:
        assert len({line.get_linestyle() for line in axis.lines}) == len({line.get_label() for line in axis.lines}) == 2
    curves.draw_without_rendering()
    once, often = (curves.axes[[*plot.PANELS].index(name)] for name in ("val/loss_dense", "train/loss"))
    assert [tick.get_text() for tick in once.get_xticklabels()] == ["a", "b"] and not once.get_xlabel()
    assert often.get_xlabel() == "steps"
    assert images.shape == (6, 3, 122, 302) and columns == 1  # the second run has no previews
    assert labels == [f"a, step {step}" for step in (10, 30, 50, 60, 80, 100)]


@pytest.mark.parametrize("count", [2, 4, 7, 11])
def test_styles_are_told_apart_in_grey(count):
    looks = styles(count)
    grey = [np.dot(look["color"][:3], (0.299, 0.587, 0.114)) for look in looks]
    assert grey == sorted(grey) and len({look["marker"] for look in looks}) == count
    assert min(np.diff(grey)) > 0.2 / count


@pytest.mark.parametrize("low, high", [(1, 1e4), (0.9, 350), (35, 64), (8, 16), (4.4, 4.6)])
def test_a_logarithmic_axis_has_readable_ticks(low, high):
    figure, (axis,) = canvas((4, 3), 1, 1)
    axis.plot([low, high])
    logarithmic(axis)
    figure.draw_without_rendering()
    bottom, top = axis.get_ylim()
    labels = [label for label in axis.yaxis.get_ticklabels() if bottom <= label.get_position()[1] <= top]
    assert 3 <= len({label.get_text() for label in labels} - {""}) <= 8


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    assert list(plot.named([tmp_path / "x" / "a", tmp_path / "y" / "b"])) == ["a", "b"]
    assert len(plot.named([tmp_path / "x" / "a", tmp_path / "y" / "a"])) == 2


def test_the_summary_has_the_newest_score_and_samples(runs, capsys):
    newest = runs / "a" / "eval" / "0000200-fd_mnist"
    newest.mkdir()
    score = {"fd_mnist": 1.234, "class_accuracy": 0.9876, "n": 1000, "network_calls": 38}
    (newest / "metrics.json").write_text(json.dumps(score))
    grid = runs / "a" / "samples" / "step_0000100-cfg2" / "grid.png"
    Image.new("RGB", (8, 8)).save(grid)
    plot.main(["summary", str(runs / "a")])
    *lines, last = capsys.readouterr().out.splitlines()
    found = {name: value for name, _, value in (line.strip().rpartition("  ") for line in lines)}
    assert {name.strip(): value.strip() for name, value in found.items()} == {
        "steps": "100", "seconds of training": "50", "images/s (median)": "32", "fd_mnist": "1.23",
        "class accuracy": "0.988", "samples scored": "1,000", "network calls an image": "38",
    }  # fmt: skip
    assert last == f"  samples: {grid}"


def test_the_summary_has_the_scores_of_any_extractor(runs, capsys):
    (runs / "a" / "eval" / "0000200-fid").mkdir()
    score = {"fid5k": 7.381, "inception_score": 98.1, "inception_score_std": 1.0, "n": 5000, "network_calls": 40}
    (runs / "a" / "eval" / "0000200-fid" / "metrics.json").write_text(json.dumps(score))
    plot.main(["summary", str(runs / "a")])
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fid5k", "7.38"] in told and ["inception_score", "98.1"] in told and len(told) == 7


@pytest.mark.parametrize("arguments, said", [
    (["nowhere"], "nowhere/metrics.jsonl does not exist"), (["x=steps"], "needed: python scripts/plot.py RUN"),
    (["summary"], "needed: python scripts/plot.py RUN"), (["summary", "nowhere"], "metrics.jsonl does not exist"),
    (["nowhere", "x=hours"], "x=hours; needed: one of steps, seconds, images"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def postscript(run):
    """Pillow starts a program to draw it, whatever the file is called."""
    (run / "samples" / "step_0000010.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def odd_name(run):
    (run / "samples" / "step_best.png").write_bytes(b"")


def text_for_a_score(run):
    (run / "eval" / "0000100-fd_mnist-once" / "metrics.json").write_text('{"step": 100, "fd_mnist": "a"}')


def no_json(run):
    (run / "eval" / "0000100-fd_mnist-once" / "metrics.json").write_text("[")


@pytest.mark.parametrize("plant, said", [
    (postscript, "step_0000010.png is no image"), (odd_name, None), (text_for_a_score, "fd_mnist=a; needed: a number"),
    (no_json, "it is not JSON"),
])  # fmt: skip
def test_a_run_of_a_stranger(runs, plant, said, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, dpi: None)
    plant(runs / "a")
    if said is None:
        plot.main([str(runs / "a")])
    else:
        with pytest.raises(UserError, match=said):
            plot.main([str(runs / "a")])
