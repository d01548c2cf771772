"""docs/tour.ipynb, made of docs/python.md and executed: `python scripts/tour.py`.

Each block of Python is a cell, with what it prints and the picture that its last line is. Needs no Jupyter.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import UserError, cli
from system.files import write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
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


def execute(sources: Sequence[str]) -> Iterator[list[dict]]:
    """The outputs of each cell, run one after another in one namespace and in this folder, as a notebook has them."""
    names = {"__name__": "__main__"}
    for source in sources:
        tree, printed, outputs = ast.parse(source), io.StringIO(), []
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, "cell", "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        if text := printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
        if isinstance(value, Image.Image):
            value.save(png := io.BytesIO(), "png")
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        yield outputs


def notebook(parts: Sequence[tuple[str, str]], outputs: Iterator[list[dict]]) -> dict:
    """nbformat 4.5."""
    made = []
    for i, (kind, text) in enumerate(parts):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(True)}
        made.append(cell | ({"execution_count": None, "outputs": next(outputs)} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main(arguments: Sequence[str]) -> None:
    if arguments:
        raise UserError(f"{arguments[0]}: this command takes no keys")
    parts = cells(PAGE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outputs = execute([text for kind, text in parts if kind == "code"])
        made = notebook([("code", SETUP), *parts], iter([[], *outputs]))
        os.chdir(ROOT)
    write_text_atomic(NOTEBOOK, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    print(NOTEBOOK)


if __name__ == "__main__":
    cli.command(main, __doc__)
