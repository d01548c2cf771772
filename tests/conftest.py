"""Every test runs from the repository root, on few threads, without the network."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded digits, prepared once for the whole session."""
    import data

    path = tmp_path_factory.mktemp("datasets") / "mnist"
    data.prepare_mnist(path)
    return path
