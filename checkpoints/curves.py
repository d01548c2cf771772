"""The log of a run, metrics.jsonl, as curves. Imports no torch."""

import json
from collections.abc import Iterator
from pathlib import Path

from system import UserError
from system.files import read_small
from system.limits import LOG_BYTES


def read_log(run_folder: Path) -> list[dict]:
    """One dict for each logged step, in order: the log's values, "step", "seconds" and "images" trained so far.

    Seconds of training: without saves, validation, scores and previews. Where a job was killed and its steps were
    trained again, the later lines count. Raises UserError where there is no log, or nothing in it yet.
    """
    log = run_folder / "metrics.jsonl"
    if not log.is_file():
        raise UserError(f"{log} does not exist; needed: the folder of a run")
    steps: dict[int, dict] = {}
    for _, _, values in log_lines(log):
        while values and steps and next(reversed(steps)) > values["step"]:
            steps.popitem()
        if values:
            steps[values["step"]] = steps.get(values["step"], {}) | values
    timed = {step for step, values in steps.items() if None not in map(values.get, ("perf/step_s", "perf/img_per_s"))}
    if not timed:
        raise UserError(f"{log} has no step of training yet")
    trained, seconds, images = 0, 0.0, 0.0
    for step, values in steps.items():
        if step in timed:
            passed, trained = step - trained, step
            seconds += passed * values["perf/step_s"]
            images += passed * values["perf/step_s"] * values["perf/img_per_s"]
        values |= {"seconds": seconds, "images": round(images)}
    return list(steps.values())


def log_lines(log: Path) -> Iterator[tuple[int, str, dict | None]]:
    """(number from 1, text, values; None where a full disk or a power cut has broken it) of each line of a log."""
    # What follows the last line's end, a job is or was writing.
    lines = read_small(log, LOG_BYTES).split(b"\n")[:-1] if log.is_file() else ()
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line.decode())
            range(values["step"]), [value + 0.0 for value in values.values() if value is not None]  # numbers all
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            values = None
        yield number, line.decode(errors="replace"), values
