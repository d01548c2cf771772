"""docs/python.md: its code, run in an empty folder; docs/tour.ipynb, which is made of it; what its functions refuse."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from checkpoints.generate import generate
from checkpoints.load import load_run
from evaluation.features import load_extractor
from evaluation.metrics import FeatureStats
from guidance import Guidance
from sample import SHIPPED
from scripts import tour
from system import UserError

SHORT = {"range(20)": "range(2)", "steps=10": "steps=2", "range(100)": "range(20)"}


def code(page: str) -> list[str]:
    return [text for kind, text in tour.cells(page) if kind == "code"]


@pytest.fixture(scope="module")
def run():
    return load_run(SHIPPED / "mnist-tread-edm")


def test_the_code_of_the_page_runs(tmp_path, digits):
    page = tour.PAGE.read_text()
    for whole, short in {**SHORT, '"datasets/mnist"': repr(str(digits))}.items():
        assert whole in page
        page = page.replace(whole, short)
    *printed, threes, distance = tour.execute(code(page), tmp_path)
    text = ["".join(part["text"]) for cell in (*printed, distance) for part in cell]
    assert [re.sub(r"\d+(\.\d+)?", "#", line) for line in text] == [
        "multiply-adds: # M dense, # M routed\n", "loss of step #: #\n", "fd_mnist: #\n"
    ]  # fmt: skip
    assert "image/png" in threes[0]["data"] and (tmp_path / "runs" / "threes.png").is_file()


def test_the_notebook_is_of_this_page():
    made = json.loads(tour.NOTEBOOK.read_text())
    setup, *others = [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]]
    assert setup == ("code", tour.SETUP) and others == tour.cells(tour.PAGE.read_text()), "python scripts/tour.py"
    shown = [output for cell in made["cells"] for output in cell.get("outputs", ())]
    assert [output["output_type"] for output in shown] == ["stream", "stream", "display_data", "stream"]


def test_a_kernel_of_another_folder_finds_the_checkout_or_says_so_in_one_line(tmp_path):
    find = f"{tour.SETUP}\nimport routing_module; print(routing_module.__file__)"
    docs, empty = tour.ROOT / "docs", tmp_path
    found, lost = (
        subprocess.run([sys.executable, "-c", find], cwd=folder, capture_output=True, text=True)
        for folder in (docs, empty)
    )
    assert found.returncode == 0 and str(tour.ROOT) in found.stdout
    assert lost.returncode == 1 and len(lost.stderr.splitlines()) == 1 and "needed: a notebook in" in lost.stderr


def test_lists_arrays_and_tensors_are_the_same_labels_and_images(run):
    kinds = ([3, 3], np.array([3, 3], np.int32), torch.tensor([3, 3]))
    drawn = [torch.cat(list(generate(run, Guidance(), [0, 1], labels, steps=1))) for labels in kinds]
    assert all(torch.equal(images, drawn[0]) for images in drawn)
    extract, stats = load_extractor("mnist"), [FeatureStats(64), FeatureStats(64)]
    given = [drawn[0], drawn[0].permute(0, 2, 3, 1).numpy()]
    features = [extract(images).pool for images in given]
    for sums, rows in zip(stats, (features[0], features[1].numpy())):
        sums.update(rows)
    assert (stats[0].mu == stats[1].mu).all() and (stats[0].sigma == stats[1].sigma).all()


@pytest.mark.parametrize("labels, needed", [([3], "1 labels for 2 seeds"), ([3, 10], "labels 3..10; the model has")])
def test_labels_that_do_not_fit_are_refused(run, labels, needed):
    with pytest.raises(UserError, match=needed):
        generate(run, Guidance(), [0, 1], labels, steps=1)


@pytest.mark.parametrize("images", [np.zeros((2, 28, 28), np.uint8), np.zeros((2, 28, 28, 3))], ids=["grey", "float"])
def test_images_of_another_type_are_refused(images):
    with pytest.raises(UserError, match=r"needed: torch.uint8 \(B, 3, H, W\)"):
        load_extractor("mnist")(images)


@pytest.mark.slow
def test_the_notebook_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "NOTEBOOK", tmp_path / "tour.ipynb")
    tour.main([])
    assert (tmp_path / "tour.ipynb").stat().st_size > 5000
