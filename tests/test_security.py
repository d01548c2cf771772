"""No call in the tree runs what it reads (performance-and-reliability gates 18 and 19, statically), and no config."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from checkpoints.load import load_run
from system import UserError
from system.files import sha256_of
from tests.made_runs import make_run

ROOT = Path(__file__).resolve().parent.parent
FILES = [p for p in ROOT.rglob("*.py") if not {".venv", "runs", "datasets"} & set(p.relative_to(ROOT).parts)]


UNSAFE = (
    "pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system", "marshal.loads",
    "joblib.load",
)  # fmt: skip


def unsafe_calls(source: str) -> list[str]:
    """Names of unsafe calls: unpickling, code from text, archives unpacked, shells."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = (
            name in UNSAFE
            or name.endswith((".extractall", ".extract"))
            or name == "torch.load"
            and keywords.get("weights_only") != "True"
            or keywords.get("allow_pickle") == "True"
            and name.endswith("load")
            or keywords.get("shell") == "True"
        )
        found += [f"{name} in line {node.lineno}"] if unsafe else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_can_run(path):
    assert unsafe_calls(path.read_text()) == []


def test_the_gate_itself():
    assert len(FILES) > 40
    bad = (
        "import torch\ntorch.load(p)\nnp.load(p, allow_pickle=True)\npickle.loads(b)\ntar.extractall()\n"
        "run(c, shell=True)\neval(x)\n"
    )
    assert len(unsafe_calls(bad)) == 6
    assert unsafe_calls("torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\nmodel.eval()\n") == []


HOSTILE = {
    "another program's function": ({"model": {"_target_": "os.system", "command": "touch {canary}"}}, "model._target_"),
    "a package's class": ({"objective": {"_target_": "subprocess.Popen", "args": ["touch", "{canary}"]}}, "objective"),
    "a file that imports": ({"model": {"_target_": "planted.Net"}}, "model._target_"),
    "our class of another kind": ({"data": {"codec": {"_target_": "edm.EDM"}}}, "data.codec._target_"),
    "Hydra's own keys": ({"model": {"_partial_": True}}, "model._partial_"),
    "an interpolation": ({"objective": {"P_mean": "${oc.env:HOME}"}}, "refers to something else"),
    "a key of ours": ({"train": {"command": "touch {canary}"}}, "unknown key 'train.command'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused_before_anything_of_it_runs(case, tmp_path, tiny_overrides, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    change, named = HOSTILE[case]
    path = make_run(tmp_path / "run", tiny_overrides) / "checkpoints" / "step_0000001"
    config = path / "config.yaml"

    def changed(values, change):
        for key, value in change.items():
            values[key] = changed(dict(values.get(key, {})), value) if isinstance(value, dict) else value
        return values

    text = yaml.safe_dump(changed(yaml.safe_load(config.read_text()), change))
    config.write_text(text.replace("{canary}", str(tmp_path / "canary")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = {"bytes": config.stat().st_size, "sha256": sha256_of(config)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=re.escape(named)) as refused:
        load_run(path)
    assert "\n" not in str(refused.value) and not (tmp_path / "canary").exists()
