"""`pip install .` brings the routing modules and nothing else, beside whatever names another project uses."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.started import ROOT, run

MODULES = ["routing_blocks.py", "routing_diffusers.py", "routing_module.py"]
ROUTED = ["tests/test_routing_families.py", "tests/test_routing_misuse.py", "tests/test_other_networks.py"]
FLUX = """
import torch, data, system, sample
from diffusers import FluxTransformer2DModel
from routing_diffusers import route, routing
sizes = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4))
flux = FluxTransformer2DModel(in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, **sizes)
route(flux, start=1, end=-2, ratio=0.5)
with routing():
    out = flux(torch.randn(1, 16, 4), torch.randn(1, 3, 8), torch.randn(1, 8), torch.rand(1), torch.zeros(16, 3),
               torch.zeros(3, 3)).sample
print(out.shape[1], data.MINE, sample.MINE, system.MINE)
"""
MODULE = """
import torch, routing_module as r
x, ids = torch.randn(2, 16, 4), r.draw_keep_ids(2, 16, 0.5)
layers = [torch.nn.Linear(4, 4) for _ in range(3)]
x, _ = r.run_blocks(enumerate(layers), x, routes=[r.Route(0.5, 0, 1)], routing=r.Routing())
print(tuple(x.shape), tuple(r.gather_tokens(x, ids).shape))
"""


def elsewhere(code, folder, *path):
    """Runs code in another folder, with what is in `path` and this Python's packages: a real start reads PYTHONPATH."""
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_install_is_three_modules_beside_a_project_with_our_names(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, site, project = (tmp_path / name for name in ("source", "site", "project"))
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    how = ["--no-deps", "--no-build-isolation", "--no-index", "-q"]  # what it needs is here
    for command in (["wheel", *how, "-w", tmp_path, source], ["install", *how, "--target", site]):
        wheels = list(tmp_path.glob("tread_routing-*.whl"))
        done = run([sys.executable, "-m", "pip", *command, *wheels])
        assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in site.glob("*") if p.suffix != ".dist-info" and p.name != "__pycache__") == MODULES
    metadata = next(site.glob("*.dist-info/METADATA")).read_text().splitlines()
    needed = [line for line in metadata if line.startswith("Requires-Dist")]
    assert needed == ["Requires-Dist: torch>=2.9", 'Requires-Dist: diffusers>=0.35; extra == "diffusers"']
    for name in ("data", "system", "sample"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("MINE = True\n")
    assert elsewhere(FLUX, project, str(site)).split() == ["16", "True", "True", "True"]


def test_the_method_is_one_file_that_runs_anywhere(tmp_path):
    shutil.copy(ROOT / "routing_module.py", tmp_path)
    assert elsewhere(MODULE, tmp_path) == "(2, 16, 4) (2, 8, 4)\n"


@pytest.mark.slow
@pytest.mark.parametrize("torch, diffusers", [("==2.13.*", "==0.35.*"), (">=2.14", ">=0.42")])
def test_the_documented_pairs_of_versions_route_alike(tmp_path, torch, diffusers):
    """In a fresh environment, from the package index."""
    done = subprocess.run([sys.executable, "-m", "venv", tmp_path])
    needed = [f"torch{torch}", f"diffusers{diffusers}", "huggingface_hub<1", "numpy", "pytest", "tqdm", "scipy"]
    needed[2:3] = needed[2:3] if "0.35" in diffusers else []  # newer ones are unknown to it
    for command in (["pip", "install", "-q", *needed], ["pytest", "-q", *ROUTED]):
        done = subprocess.run([tmp_path / "bin/python", "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
