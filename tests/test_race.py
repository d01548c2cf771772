"""scripts/race.py: an interrupted race ends as an undisturbed one, and a record is what its logs say."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import scripts.race
from checkpoints.config import Settings
from checkpoints.load import build_network
from contracts import Routing
from scripts.race import Scored, compare, draw, ended, load_race, main, read_run, table
from system import UserError, cli
from system.settings import parse
from tests import started
from tests.conftest import ROOT

RECORDS = sorted(path.parent for path in (ROOT / "records").glob("*/race.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTING = threading.Lock()  # a race starts its runs in threads
MADE = ("statistics.md", "table.md", "figure.png")


def command(verb, name, folder, *overrides):
    return [sys.executable, "scripts/race.py", verb, f"name={name}", f"records={folder}", *overrides]


def forked(command, cores, run_folder):
    """race.start, but for the start of Python, and the end with the race."""
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    with STARTING, open(f"{run_folder}.log", "a") as log:
        return started.Process(command, env=os.environ | {"OMP_NUM_THREADS": str(cores)}, stdout=log, stderr=log)


def raced(folder, *overrides):
    """What `race.py run name=smoke` prints, in this process, with the runs forked."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(scripts.race, "start", forked)
        patch.setattr(os, "sched_setaffinity", lambda process, cores: None)  # which all later forks would inherit
        main(["run", "name=smoke", f"records={folder}", *overrides])
    return out.getvalue()


def refused(verb, name, folder, *overrides):
    """What the user is told."""
    with pytest.raises(UserError) as error:
        main([verb, f"name={name}", f"records={folder}", *overrides])
    return str(error.value)


def scores(run):
    return [json.loads(line)["fd_mnist"] for line in (run / "scores.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The record of a race."""
    folder = tmp_path_factory.mktemp("race")
    assert "still to be run: dit-0, dit-1" in raced(folder / "whole", f"runs={folder / 'a'}", "only=[tread]")
    raced(folder / "whole", f"runs={folder / 'a'}")
    return next((folder / "whole").iterdir())


@pytest.mark.slow
def test_a_killed_race_goes_on_to_the_same_scores(tmp_path):
    """All in processes of their own: forked ones may have more threads, which round otherwise."""
    log, deadline = tmp_path / "b", time.monotonic() + 600
    whole = command("run", "smoke", tmp_path / "whole", f"runs={tmp_path / 'a'}", "only=[tread]")
    assert b"still to be run: dit-0, dit-1" in subprocess.run(whole, cwd=ROOT, capture_output=True, check=True).stdout
    race = command("run", "smoke", tmp_path / "killed", f"runs={log}")
    killed = subprocess.Popen(race, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in log.glob("*/tread-0/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed").glob("*/tread-0"))
    while any(b"/b/" in line.read_bytes() for line in Path("/proc").glob("[0-9]*/cmdline") if line.is_file()):
        assert time.monotonic() < deadline, "the runs outlived the race"
        time.sleep(0.1)
    subprocess.run(race, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    first, second = (next((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    for run in ("tread-0", "tread-1"):
        assert scores(first / run) == scores(second / run)


def test_one_seed_is_shown_alone(smoke, tmp_path):
    shutil.copytree(smoke, tmp_path / smoke.name)
    shutil.rmtree(tmp_path / smoke.name / "dit-1")
    main(["show", "name=smoke", f"records={tmp_path}", "seeds=[0]"])
    text, whole = ((folder / smoke.name / "statistics.md").read_text() for folder in (tmp_path, smoke.parent))
    assert "| 1 |" in text and "no test of single runs" in text and "p-values" not in text
    assert "| 2 |" in whole and "p-values" in whole
    assert (tmp_path / smoke.name / "race.yaml").read_text() == (smoke / "race.yaml").read_text()


def test_the_scores_are_of_their_seeds_and_the_record_of_no_machine(smoke):
    assert scores(smoke / "tread-0") != scores(smoke / "tread-1")
    assert str(smoke.parent.parent) not in "".join(path.read_text() for path in smoke.glob("*/*"))


def test_a_finished_race_is_not_run_again(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke.glob("*-?/*")}
    done = started.run(command("run", "smoke", smoke.parent, f"runs={smoke / 'unused'}"))
    assert done.returncode == 0 and "finished" not in done.stdout and not (smoke / "unused").exists()
    assert before == {path: path.stat().st_mtime_ns for path in smoke.glob("*-?/*")}


@pytest.mark.parametrize("lost", ["log line", "validation", "score", "run", "file"])
def test_what_is_missing_is_named(smoke, tmp_path, lost):
    shutil.copytree(smoke, tmp_path / smoke.name)
    run = tmp_path / smoke.name / "dit-1"
    if lost in ("log line", "validation", "score"):
        path = run / ("scores.jsonl" if lost == "score" else "metrics.jsonl")
        key = {"log line": "train/loss", "validation": "val/loss_dense", "score": "fd_mnist"}[lost]
        lines = path.read_text().splitlines(keepends=True)
        gone = next(line for line in lines if json.loads(line)["step"] == 10 and key in json.loads(line))
        path.write_text("".join(line for line in lines if line != gone))
    elif lost == "run":
        shutil.rmtree(run)
    else:
        (run / "machine.json").unlink()
    said = refused("show", "smoke", tmp_path)
    named = {"log line": "line of step 10", "validation": "validation of step 10"}
    assert "dit-1" in said and named.get(lost, "") in said


def test_bad_input_is_one_line(smoke, tmp_path):
    assert "digits196" in refused("run", "none", tmp_path)
    assert "of dit, tread" in refused("run", "smoke", tmp_path, "only=[dit,best]")
    assert "cores" in refused("run", "smoke", tmp_path, "at_once=1000")
    for verb in ("run", "show"):
        assert "seeds=[7]; needed: of 0, 1" in refused(verb, "smoke", tmp_path, "seeds=[1,7]")
    assert "no record" in refused("show", "smoke", tmp_path)
    assert not list(tmp_path.iterdir())
    other = tmp_path / smoke.name
    shutil.copytree(smoke, other)
    (other / "race.yaml").write_text((other / "race.yaml").read_text().replace("steps: 20", "steps: 30"))
    done = started.run(command("run", "smoke", tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "another config" in done.stderr


def test_a_run_that_has_ended_stays_so(tmp_path):
    """The line of the step at which it was stopped can be a fast one, and lower the median."""
    race, lines = load_race("quickstart"), []
    log = tmp_path / "metrics.jsonl"
    for step, cpu_s, said in zip((100, 200, 240, 241, 242), (0.8, 1, 1, 0.1, 0.1), (False, False, True, True, True)):
        perf = {"perf/cpu_s": cpu_s, "perf/step_s": 1.0, "perf/img_per_s": 1.0}
        lines.append(json.dumps({"step": step, "train/loss": 1.0, **perf}))
        log.write_text("\n".join(lines) + "\n")
        assert ended(race, tmp_path) is said, step


@pytest.mark.parametrize("name, last", [("quickstart", 300), ("smoke", 20)])
def test_a_run_ends_after_the_validation_of_its_last_step(name, last, tmp_path):
    lines = [{"step": last, "train/loss": 1.0, "perf/cpu_s": 1.0, "perf/step_s": 1.0, "perf/img_per_s": 1.0}]
    for said in (False, True):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert ended(load_race(name), tmp_path) is said
        lines.append({"step": last, "val/loss_dense": 0.3})


@pytest.mark.parametrize(
    "wrong, said",
    [
        *((("  tread:", f"  {json.dumps(name)}:"), repr(name)) for name in ("up/there", "..", "", "a b")),
        (("save_every: 5", "save_every: 3"), "multiple of save_every 3"),  # a score needs a checkpoint
        (("steps: 20", "seconds: 20\nsteps: 20"), "one of the two"),
    ],
)
def test_a_race_that_cannot_be_is_refused(wrong, said, tmp_path, monkeypatch):
    text = (ROOT / "configs/race/smoke.yaml").read_text()
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "odd.yaml").write_text(text.replace(*wrong))
    monkeypatch.setattr(cli, "CONFIG_DIR", tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        load_race("odd")


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_committed_record_is_what_its_logs_say(record, tmp_path):
    again, race = tmp_path / record.name, load_race(record.name[11:])
    seeds = race.seeds
    if left := scripts.race.missing_runs(race, record):  # a race of several sittings
        assert (record / "race.yaml").read_text() == scripts.race.as_yaml(race)
        assert [read_run(race, record / name) for name in scripts.race.run_names(race) if name not in left]
        seeds = [seed for seed in seeds if not any(name.endswith(f"-{seed}") for name in left)]
        if not any((record / name).exists() for name in MADE):
            return
    shutil.copytree(record, again, ignore=shutil.ignore_patterns(*MADE))
    main(["show", f"name={record.name[11:]}", f"records={tmp_path}", f"seeds={seeds}"])
    for name in MADE[:2]:
        assert (record / name).read_text() == (again / name).read_text()
    with Image.open(record / MADE[2]) as a, Image.open(again / MADE[2]) as b:
        assert a.size == b.size
        difference = np.asarray(a.convert("L"), float) - np.asarray(b.convert("L"), float)
    assert abs(difference).mean() < 2  # of 255: other versions of matplotlib draw text a little differently


def test_the_pages_quote_the_records():
    """Between <!-- records/... --> and <!-- end --> a page has the words of the file."""
    found = 0
    for page in PAGES:
        for name, text in re.findall(r"<!-- (records/[^ ]+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL):
            assert text == (ROOT / name).read_text(), f"{page.name}: not what {name} says"
            found += 1
    assert found or not RECORDS


def p_values(name: str) -> list[float]:
    """Of a record's statistics.md."""
    path = ROOT / name / "statistics.md"
    text = path.read_text() if path.exists() else ""  # of a race that is not finished
    return [float(p) for p in re.findall(r"\| ([\d.e-]+) \|\n", text)]


def quoted_p_values(text: str) -> list[str]:
    """`p = 0.02 and 0.007`, `p is 0.08 for TREAD and 0.09 for SPRINT`."""
    pairs = re.findall(r"\bp\s(?:=|is)\s(0\.\d+)(?:[\w\s]*?\band\s(0\.\d+))?", text)
    return [p for pair in pairs for p in pair if p]


def test_the_pages_quote_the_tests_of_the_records():
    """Every p in the prose is, rounded, one of the records of its section, or of any record in the README."""
    sections = re.split(r"^##+ ", (ROOT / "docs" / "results.md").read_text(), flags=re.MULTILINE)
    pieces = [(text, set(re.findall(r"records/[^/`]+(?=/)", text))) for text in sections]
    pieces.append(((ROOT / "README.md").read_text(), {f"records/{record.name}" for record in RECORDS}))
    found = 0
    for text, names in pieces:
        known = [p for name in names for p in p_values(name)]
        for p in quoted_p_values(text):
            assert any(f"{value:.{len(p) - 2}f}" == p for value in known), f"p = {p}: not in {sorted(names)}"
            found += 1
    assert found >= 10


def mixer_rows(record: Path) -> list[str]:
    """A row of the page's table for each contestant but the dense one."""
    table, statistics = ((record / name).read_text() for name in ("table.md", "statistics.md"))
    tokens, mixer = re.search(r"mixers(\d+)_(\w+)", record.name).groups()
    seconds, steps = re.search(r"steps in ([\d,]+) s .* after ([\d,]+) steps", table).groups()
    rows = [re.split(r" \| ", line.strip("| ")) for line in table.splitlines()[2:]]
    (_, pace, _, by_time, _, _, by_steps, *_), *others = rows
    made = []
    for name, cost, _, time_, _, _, steps_, *_ in others:
        p_steps, p_time, *_ = re.findall(rf"^\| {name} .* ([\d.e-]+) \|$", statistics, re.MULTILINE)
        told = f"[{mixer}](../records/{record.name}/statistics.md), {tokens}" + ", whole rows" * (name == "rows")
        cells = told, f"{float(cost) / float(pace):.2f}", f"{seconds} s", by_time, time_, p_time
        made.append(f"| {' | '.join(cells)} | {steps} | {by_steps} | {steps_} | {p_steps} |")
    return made


def test_the_table_of_mixers_is_of_their_records():
    finished = [record for record in RECORDS if "_mixers" in record.name and (record / MADE[1]).exists()]
    expected = {row for record in finished for row in mixer_rows(record)}
    page = (ROOT / "docs" / "results.md").read_text()
    assert {line for line in page.splitlines() if re.match(r"\| \[\w+\]\(.*_mixers", line)} == expected


def test_multiply_adds_are_those_of_the_network_forwards_and_backwards():
    run = read_run(load_race("digits196"), ROOT / "records/2026-11-27_digits196/tread-0")
    net = build_network(parse(Settings, cli.load_config("config", ["model=tread", "model.size=DiT-XS/2"])))
    np.testing.assert_allclose(run.macs, 3 * 32 * run.steps * net.macs(Routing()))


def scored(*values, pace=1.0):
    """A run of a step's cost `pace`, with these distances after 100, 200, ... steps."""
    steps = np.arange(1, len(values) + 1) * 100
    return Scored(pace, steps, 1e9 * pace * steps, {"fd_mnist": [*values], "class_accuracy": [0.5] * len(values)})


@pytest.mark.parametrize("count", [2, 11])
@pytest.mark.parametrize("points", [1, 3])
def test_a_figure_has_measured_points_and_bands_of_logarithms(count, points, tmp_path, monkeypatch):
    drawn, rule = [], dataclasses.replace(load_race("smoke"), seeds=[0, 1])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    values = [4.0, 20.0, 10.0][:points], [1.0, 5.0, 2.5][:points]  # of two seeds: a factor of 4 apart
    draw(rule, {f"c{i}": [scored(*seed, pace=1 + i) for seed in values] for i in range(count)}, tmp_path / "figure.png")
    *curves, names = drawn[0].axes
    labels = ["steps of training", "trillion multiply-adds of training"] if points > 1 else []
    assert [axis.get_xlabel() for axis in curves] == labels
    assert [label.get_text() for label in names.get_xticklabels()] == [f"c{i}" for i in range(count)]
    for axis in curves:
        mean = axis.lines[0]
        np.testing.assert_allclose(mean.get_ydata(), np.sqrt(np.prod(values, 0)))
        low, high = axis.collections[0].get_datalim(axis.transData).intervaly
        np.testing.assert_allclose((low, high), (2 / 4 ** (1 / np.sqrt(2)), 10 * 4 ** (1 / np.sqrt(2))), rtol=1e-6)
        assert len(mean.get_xdata()) == points and "lower is better" in drawn[0].axes[0].get_ylabel()


def test_one_seed_has_neither_deviation_nor_test():
    rule, runs = load_race("smoke"), {"a": [scored(2, 1)], "b": [scored(3, 2, pace=2)]}
    assert "nan" not in table(rule, runs) and "±" not in table(rule, runs)
    assert compare({"a": np.array([1.0]), "b": np.array([2.0])}, "less")[1][1][4:] == ["+1", "", ""]


def test_runs_whose_own_times_have_nothing_in_common_are_compared_at_one_pace():
    race, scores = load_race("mixers196_attention"), {"fd_mnist": [9.0, 8.0], "class_accuracy": [0.1, 0.2]}
    columns = scores | {"val/loss_dense": [2.0, 1.0]}
    runs = [Scored(pace, np.array([200, 400]), np.array([1.0, 2.0]), columns) for pace in (0.1, 0.1, 5.0)]
    level = {name: scripts.race.at_one_pace(runs) for name in race.contestants}
    text = scripts.race.statistics(race, level, dict.fromkeys(race.contestants, runs))
    assert "own time per step" not in text and "fd_mnist after 400 steps" in text


def test_after_an_error_no_other_run_begins(tmp_path, monkeypatch):
    begun, third = [], threading.Event()

    def train(race, contestant, seed, run_folder):
        begun.append(run_folder.name)
        if len(begun) > 2:
            third.set()
        if run_folder.name == "dit-0":
            third.wait(1)
        raise RuntimeError(run_folder.name)

    monkeypatch.setattr(scripts.race, "train", train)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: None)
    with pytest.raises(RuntimeError, match="dit-0"):
        main(["run", "name=smoke", f"records={tmp_path}", f"runs={tmp_path / 'runs'}"])
    assert sorted(begun) == ["dit-0", "tread-0"]


def test_the_last_step_is_scored_with_more_images(smoke):
    for scores in smoke.glob("*/scores.jsonl"):
        assert [(found["step"], found["n"]) for found in map(json.loads, scores.open())] == [(10, 50), (20, 60)]


def far(text: str) -> str:
    return text + json.dumps(json.loads(text.splitlines()[0]) | {"step": 10**17}) + "\n"


def deep(text: str) -> str:
    config = yaml.safe_load(text)
    return yaml.safe_dump(config | {"model": config["model"] | {"depth": 10**9}})


HOSTILE = {
    "a score that is text": ("scores.jsonl", lambda text: text.replace('_mnist": ', '_mnist": "a", "x": ', 1), "fd"),
    "a score that is a list": ("scores.jsonl", lambda text: f"[1]\n{text}", "scores.jsonl is damaged: it holds a list"),
    "a step that is far away": ("metrics.jsonl", far, "has no line of step"),
    "a time that is text": ("metrics.jsonl", lambda text: text.replace('cpu_s": ', 'cpu_s": "a", "x": '), "no step"),
    "a network of a billion blocks": ("config.yaml", deep, "depth=1000000000; needed: at most"),
    "no network": ("config.yaml", lambda text: "[1]", "needed: the sections model and train"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_record_is_one_line(case, tmp_path):
    record = RECORDS[0]
    run = next(path.parent for path in sorted(record.glob("*/config.yaml")))
    name, change, said = HOSTILE[case]
    shutil.copytree(run, tmp_path / run.name)
    (tmp_path / run.name / name).write_text(change((run / name).read_text()))
    with pytest.raises(UserError, match=said):
        read_run(load_race(record.name[11:]), tmp_path / run.name)


def test_a_figure_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("my thesis")
    (tmp_path / "figure.png").symlink_to(tmp_path / "precious")
    race = dataclasses.replace(load_race("smoke"), seeds=[0, 1])
    draw(race, {name: [scored(2.0, 1.0), scored(3.0, 1.5)] for name in race.contestants}, tmp_path / "figure.png")
    assert (tmp_path / "precious").read_text() == "my thesis" and not (tmp_path / "figure.png").is_symlink()
