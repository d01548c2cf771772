"""Tensors from disk are compared with what is expected before memory is taken, or a kernel sees them."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import conditions
from checkpoints.load import load_run
from checkpoints.run_folder import load_optimizer, load_strictly
from system import UserError
from system.files import sha256_of
from tests.made_runs import make_run
from weights import foreign


def stepped():
    """(model, optimizer) after one step: what checkpoints hold."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(optimizer, model):
    return {
        f"{name}/{field}": value for name, p in model.named_parameters() for field, value in optimizer.state[p].items()
    }


DAMAGE = {
    "moments of one number": ("weight/exp_avg", lambda t: torch.zeros(1), "needed: torch.float32 (2, 3)"),
    "moments of integers": ("weight/exp_avg", lambda t: t.long(), "int64"),
    "moments of half precision": ("weight/exp_avg_sq", lambda t: t.half(), "float16"),
    "variances below 0": ("weight/exp_avg_sq", lambda t: t - 1, "not below 0"),
    "moments not finite": ("bias/exp_avg", lambda t: t * float("nan"), "not finite"),
    "steps below 0": ("weight/step", lambda t: t * 0 - 5, "not below 0"),
    "two steps": ("weight/step", lambda t: torch.ones(2), "weight/step is torch.float32 (2,)"),
    "whole steps": ("weight/step", lambda t: t.long(), "int64"),
    "one field missing": ("weight/exp_avg_sq", lambda t: None, "of another optimizer"),
    "a field too much": ("weight/max_exp_avg_sq", lambda t: torch.zeros(2, 3), "of another optimizer"),
    "a stranger's parameter": ("other/step", lambda t: torch.ones(()), "the state of other"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_optimizer_takes_only_its_own_state(tmp_path, damage):
    key, change, named = DAMAGE[damage]
    model, optimizer = stepped()
    tensors = state(optimizer, model)
    tensors[key] = change(tensors.get(key))
    save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / "optimizer.safetensors")
    with pytest.raises(UserError) as refused:
        load_optimizer(tmp_path, model, optimizer)
    assert named in str(refused.value) and "\n" not in str(refused.value)


ODD = {
    "nan": lambda t: t * float("nan"),
    "inf": lambda t: t / 0,
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "bool": lambda t: t > 0,
}


@pytest.mark.parametrize("odd", ODD)
def test_weights_are_plain_finite_numbers(odd, tmp_path):
    model = torch.nn.Linear(3, 2)
    named = {"weight": ODD[odd](torch.ones(2, 3)), "bias": torch.zeros(2)}
    with pytest.raises(UserError, match="weight"):
        load_strictly(model, named, "a file")
    assert model.weight.isfinite().all()


def test_one_number_that_stands_for_many_is_refused(tmp_path):
    torch.save({"ema": {"a": torch.zeros(1).expand(10**10)}}, tmp_path / "DiT.pt")
    with pytest.raises(UserError, match="stand for several"):
        foreign.read(tmp_path / "DiT.pt")


SIZES = {
    "depth": 10**9, "hidden_size": 10**6, "input_size": 10**6, "num_classes": 10**9, "mlp_ratio": 1e12,
}  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
def test_a_config_is_compared_with_its_tensors_first(tmp_path, tiny_overrides, key, monkeypatch):
    path = make_run(tmp_path / "run", tiny_overrides) / "checkpoints" / "step_0000001"
    config = path / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["model"][key] = SIZES[key]
    config.write_text(yaml.safe_dump(values))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = {"bytes": config.stat().st_size, "sha256": sha256_of(config)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=key):
        load_run(path)


def test_a_number_that_is_no_size_may_be_large(tmp_path, tiny_overrides):
    """A weight of the loss or, in a network of one's own, the period of rotary angles."""
    run = make_run(tmp_path / "run", [*tiny_overrides, "model=maskdit", "model.mae_weight=10000.0"])
    assert load_run(run, device="cpu").model.mae_weight == 1e4


KEPT = {
    "labels of numbers": {"labels": torch.ones(3)},
    "labels in rows": {"labels": torch.ones(3, 2, dtype=torch.int64)},
    "a mask of numbers": {"states": torch.ones(2, 3, 4), "mask": torch.ones(2, 3)},
    "another mask": {"states": torch.ones(2, 3, 4), "mask": torch.ones(2, 4, dtype=torch.bool)},
    "states not finite": {"states": torch.ones(2, 3, 4) / 0, "mask": torch.ones(2, 3, dtype=torch.bool)},
}


@pytest.mark.parametrize("kept", KEPT)
def test_kept_conditions_have_their_shapes(kept, tmp_path):
    save_file(KEPT[kept], tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="needed: int64"):
        conditions.load(load_file(tmp_path / "x.safetensors"))


STATS = {"mean": torch.zeros(4), "std": torch.ones(4), "null": torch.ones(2, 4)}


@pytest.mark.parametrize("other", [
    {"std": torch.zeros(4)}, {"std": torch.ones(3)}, {"mean": torch.ones(4) / 0}, {"null": torch.ones(4)},
    {"null": torch.ones(0, 4)}, {"null": None}, {"mean": None}, {"states": torch.ones(2, 3, 5)},
])  # fmt: skip
def test_what_normalises_texts_has_its_shapes(other):
    assert conditions.load_stats(STATS).null.shape == (2, 4) and conditions.load_stats({}) is None
    given = {name: tensor for name, tensor in (STATS | other).items() if tensor is not None}
    with pytest.raises(UserError, match="the texts' statistics have odd shapes or numbers; needed: finite mean"):
        conditions.load_stats(given)
