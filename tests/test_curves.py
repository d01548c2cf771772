"""The log as curves: each step once, with the seconds and images that it took to get there."""

import json

import pytest

from checkpoints.curves import read_log
from system import UserError


def line(step, loss, step_s=0.5, batch=16):
    values = {"step": step, "train/loss": loss, "perf/step_s": step_s, "perf/img_per_s": batch / step_s}
    return json.dumps(values) + "\n"


def test_seconds_and_images_add_up_over_uneven_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line(10, 1.0) + line(12, 0.9, step_s=2.0) + line(20, 0.8, step_s=0.25))
    assert [(v["step"], v["seconds"], v["images"]) for v in read_log(tmp_path)] == [
        (10, 5.0, 160), (12, 9.0, 192), (20, 11.0, 320),
    ]  # fmt: skip


def test_steps_trained_again_count_once_and_the_lines_of_a_step_are_one(tmp_path):
    first = line(10, 1.0) + line(20, 0.9) + line(30, 0.8)
    again = line(25, 0.7, step_s=1.0) + '{"step": 25, "val/loss_dense": 0.6}\n' + line(30, 0.5)
    (tmp_path / "metrics.jsonl").write_text(first + again)
    found = read_log(tmp_path)
    assert [(v["step"], v["train/loss"], v["seconds"]) for v in found] == [
        (10, 1.0, 5.0), (20, 0.9, 10.0), (25, 0.7, 15.0), (30, 0.5, 17.5),
    ]  # fmt: skip
    assert found[2]["val/loss_dense"] == 0.6


def test_broken_and_half_written_lines_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'\x00\xff\n{"step": "x"}\n{"step": 1.5}\n{"step": 5, "train/loss": "x"}\n[]\n'
        + (line(10, 1.0) + line(20, 0.9)[:30]).encode()
    )
    assert [v["step"] for v in read_log(tmp_path)] == [10]


def test_no_log_is_one_line(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl does not exist"):
        read_log(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss_dense": 1.0}\n')
    with pytest.raises(UserError, match="no step of training yet"):
        read_log(tmp_path)
