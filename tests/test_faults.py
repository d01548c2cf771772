"""The fault program in its short form, and the page that has its table."""

import pydoc
import re
import subprocess
import sys

import pytest

import checkpoints.load
from tests import faults
from tests.conftest import ROOT

ROW = re.compile(r"^\| (R\d+ .+?) \| .+ \| (.+?) \|$", re.MULTILINE)


@pytest.mark.slow
def test_the_quick_storm_misses_no_bar():
    command = [sys.executable, "-m", "tests.faults", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    shown = {what for what, _ in ROW.findall(done.stdout)}
    of_nodes = {"R9 max abs difference after two lost nodes"} | {what for what in faults.ROWS if "node of two" in what}
    assert shown == faults.ROWS.keys() - of_nodes


def test_the_page_has_the_rows_of_the_program():
    needed = {what: f"<= {bar} s" if isinstance(bar, int) else bar for what, bar in faults.ROWS.items()}
    assert ROW.findall((ROOT / "docs" / "reliability.md").read_text()) == list(needed.items())


def build_anything(section, base, key):
    """system.building.build without its rule."""
    return pydoc.locate(section["_target_"])(**{name: value for name, value in section.items() if name != "_target_"})


def test_a_hostile_config_counts_as_refused_for_its_class_alone(tmp_path, monkeypatch):
    """Neither where nothing checks the class, nor where the checkpoint's manifest is what is wrong."""
    folders = [tmp_path / name for name in ("as it is", "unchecked", "unsealed")]
    for folder in folders:
        folder.mkdir()
    assert [good for *_, good in faults.planted_code(folders[0])] == [True, True]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.load, "build", build_anything)
        assert [good for *_, good in faults.planted_code(folders[1])] == [False, False]
    monkeypatch.setattr(faults, "plant", lambda checkpoint, *_: (checkpoint / "config.yaml").write_text("{}"))
    assert [good for *_, good in faults.planted_code(folders[2])] == [False, True]
