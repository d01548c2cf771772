"""Every command of the README's bash blocks, word for word, in a clean copy; training is cut short by appended keys."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = {
    "train.py": "train.max_steps=2 train.compile=off model.depth=6 model.hidden_size=32 sampler.num_steps=2 "
    "preview.num_images=10 train.val_samples=50",
    "sample.py": "steps=2",
    "rf.py": "steps=2",
    "fid.py calc": "steps=2 seeds=0-49",
    "bench.py": "model.depth=6 model.hidden_size=32 model.num_heads=2 train.compile=off",
}


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"## Your own data.*?\n## ", "## ", text, flags=re.DOTALL)  # test_encode.py runs it
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return [line for line in lines if "scripts/guidance_" not in line]  # tests/test_guidance_scripts.py runs them


def shortened(command: str) -> list[str]:
    for program, keys in SHORT.items():
        if program in command and "--cfg" not in command:
            return shlex.split(command) + keys.split()
    return shlex.split(command)


def test_every_command_of_the_readme_runs(tmp_path, digits):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    clone = tmp_path / "clone"
    made = {".venv", "runs", "datasets", "__pycache__"}
    files = [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() and not made & set(p.relative_to(ROOT).parts)]
    for name in tracked or files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    shutil.copytree(digits, clone / "datasets" / "mnist")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    assert len(commands()) >= 10
    for command in commands():
        done = subprocess.run(
            shortened(command), cwd=clone, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
