"""Every command in the bash blocks of README and docs, word for word, in a clean copy, with training cut short.

Those of docs are among the slow tests.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import started

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SHORT = {
    "sweep.py": "train.max_steps=2 train.compile=off model.depth=6 model.hidden_size=32 preview.every=0",
    "train.py": "train.max_steps=2 train.compile=off model.depth=6 model.hidden_size=32 sampler.num_steps=2 "
    "preview.num_images=10 train.val_samples=50",
    "sample.py": "steps=2",
    "finetune_diffusers.py": "steps=2",
    "rf.py": "steps=2",
    "fid.py calc": "steps=2 seeds=0-49",
    "bench.py": "model.depth=6 model.hidden_size=32 model.num_heads=2 train.compile=off",
}
LAUNCHERS = {
    "python": [], "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}  # fmt: skip


def text_of(page: str) -> str:
    """A page without the commands that tests/test_encode.py runs."""
    if page == "docs/data.md":
        return ""
    return re.sub(r"## Your own data.*?\n## ", "## ", (ROOT / page).read_text(), flags=re.DOTALL)


def commands(pages: list[str]) -> list[str]:
    """In the order of the pages, each once."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(map(text_of, pages)), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    lines = list(dict.fromkeys(lines))
    return [line for line in lines if "scripts/guidance_" not in line]  # tests/test_guidance_scripts.py runs them


def shortened(command: str) -> list[str]:
    for program, keys in SHORT.items():
        if program in command and "--cfg" not in command:
            return shlex.split(command) + keys.split()
    return shlex.split(command)


@pytest.mark.parametrize("pages", [["README.md"], pytest.param(PAGES, marks=pytest.mark.slow)], ids=["readme", "all"])
def test_every_command_runs(pages, tmp_path, digits):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    clone = tmp_path / "clone"
    made = {".venv", "runs", "datasets", "__pycache__"}
    files = [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file() and not made & set(p.relative_to(ROOT).parts)]
    for name in tracked or files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    shutil.copytree(digits, clone / "datasets" / "mnist")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    assert len(commands(pages)) > 5
    for command in commands(pages):
        program, *arguments = shortened(command)
        line = [sys.executable, *LAUNCHERS[program], *arguments]
        done = started.run(line, cwd=clone, env=environment, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "assets/README.md"], ids=str)
def test_links_and_files_that_are_named_exist(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    folders = "configs|data|docs|evaluation|scripts|system|tests|training|checkpoints"
    named = re.findall(rf"`((?:{folders})/[\w/.]+)`", page.read_text())
    named = [path for path in named if "/my" not in path]  # what a reader is told to write
    assert not [path for path in named if not (ROOT / path).exists()]
