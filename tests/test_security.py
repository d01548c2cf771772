"""No call in the tree that runs what it reads (performance-and-reliability gates 18 and 19, statically)."""

import ast
from pathlib import Path

import pytest

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
