"""A network that starts from one of other classes, and a folder of somebody's pictures trained on in one command."""

import pytest
import torch

from checkpoints.load import build_network, load_run
from edm import EDM
from system import UserError
from tests.made_runs import made_settings, make_run
from training.prepare import start_from

TINY = ["model.depth=6", "model.hidden_size=32", "model.num_heads=2", "preview.every=0"]


def started_from(folder, *overrides):
    """(the network of the source, a network of these settings that started from it, what was said)"""
    settings = made_settings([*TINY, *overrides])
    net = build_network(settings)
    told = start_from(str(folder), net, EDM(), settings.data)
    return load_run(folder, device="cpu").model, net, told


@pytest.mark.parametrize("model", ["dit", "maskdit"])
def test_classes_keep_their_rows_by_name_and_new_ones_begin_as_no_label(model, tmp_path):
    keys = [f"model={model}"]
    folder = make_run(tmp_path / "old", [*TINY, *keys, "data.num_classes=4", "data.classes=[cat,dog,cow]"])
    old, net, told = started_from(folder, *keys, "data.num_classes=3", "data.classes=[dog,hen,cat]")
    rows = [m.y_embedder(torch.arange(n + 1)) for m, n in ((old, 4), (net, 3))]  # as the network reads them
    assert torch.equal(rows[1], rows[0][[1, 4, 0, 4]])
    assert told == "4 classes become 3; 2 kept by name: dog, cat; new ones begin as no label"
    others = [{k: v for k, v in m.state_dict().items() if "y_embedder" not in k} for m in (old, net)]
    assert all(torch.equal(others[0][key], others[1][key]) for key in others[0] | others[1])


def test_classes_without_names_are_all_kept_or_none(tmp_path):
    folder = make_run(tmp_path / "old", [*TINY, "data.num_classes=3"])
    old, net, told = started_from(folder, "data.num_classes=3", "data.classes=[a,b,c]")
    assert told == "" and torch.equal(net.y_embedder.embedding_table.weight, old.y_embedder.embedding_table.weight)
    old, net, told = started_from(folder, "data.num_classes=2", "data.classes=[a,b]")
    assert told.startswith("3 classes become 2; 0 kept by name, for the names") and "recorded in both" in told
    rows = old.y_embedder.embedding_table.weight
    assert torch.equal(net.y_embedder.embedding_table.weight, rows[[3, 3, 3]])
    with pytest.raises(UserError, match="is of another model"):
        started_from(folder, "data.num_classes=null", "data.condition=none")
