"""The storm in its short form."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_quick_storm_misses_no_bar():
    command = [sys.executable, "scripts/faults.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    shown = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("R")}
    assert shown == {f"R{i}" for i in range(1, 11)} - {"R4"}  # tests/test_processes.py has it
