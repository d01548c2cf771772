"""docs/tour.ipynb, made of docs/python.md and executed: `python scripts/tour.py`.

Each block of Python is a cell, with what it prints and the picture that its last line is. Needs no Jupyter.
"""

import ast
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import UserError, cli
from system.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
END = "\f"  # of a cell's output
PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "tour.ipynb"
# A notebook's kernel starts in the notebook's folder, or wherever Jupyter was started.
SETUP = """import os, sys
from pathlib import Path

found = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "routing_module.py").is_file()]
if not found:
    sys.exit(f"{Path.cwd()} is not within the checkout; needed: a notebook in the folder of train.py, or os.chdir(it)")
os.chdir(found[0])
sys.path.insert(0, str(found[0]))"""


def cells(page: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) in the order of the page."""
    parts = re.split(r"^```python\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)  # text, code, text, ...
    kinds = [("markdown", "code")[i % 2] for i in range(len(parts))]
    return [(kind, text.strip()) for kind, text in zip(kinds, parts) if text.strip()]


def execute(sources: Sequence[str], folder: str | Path) -> list[list[dict]]:
    """The outputs of each cell, as a notebook has them: one program, run in `folder` with the checkout on its path."""
    program = ""
    for i, source in enumerate(sources):
        last = ast.parse(source).body[-1]
        lines = source.splitlines()
        if isinstance(last, ast.Expr):
            shown = "\n".join(lines[last.lineno - 1 :])
            lines[last.lineno - 1 :] = [f"value = {shown}", f"value is None or value.save('{folder}/cell{i}.png')"]
        program += "\n".join([*lines, f"print({END!r}, end='')", ""])
    command, where = [sys.executable, "-c", program], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=where, stdout=subprocess.PIPE, text=True, check=True)
    outputs = []
    for i, printed in enumerate(done.stdout.split(END)[:-1]):
        texts = [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(True)}] if printed else []
        pictures = [base64.b64encode(path.read_bytes()).decode() for path in Path(folder).glob(f"cell{i}.png")]
        shown = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": png}} for png in pictures]
        outputs.append(texts + shown)
    return outputs


def notebook(parts: Sequence[tuple[str, str]], outputs: Sequence[list[dict]]) -> dict:
    """nbformat 4.5."""
    made, rest = [], iter(outputs)
    for i, (kind, text) in enumerate(parts):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(True)}
        made.append(cell | ({"execution_count": None, "outputs": next(rest)} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise UserError(f"{arguments[0]}: this command takes no keys")
    parts = cells(PAGE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        outputs = execute([text for kind, text in parts if kind == "code"], folder)
    made = notebook([("code", SETUP), *parts], [[], *outputs])
    write_text_atomic(NOTEBOOK, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(NOTEBOOK)


if __name__ == "__main__":
    cli.command(main, __doc__)
