"""A network that starts from one of other classes, and a folder of somebody's pictures trained on in one command."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import data
from checkpoints.load import build_network, load_run, with_classes
from contracts import Network
from edm import EDM
from system import UserError, cli
from tests import started
from tests.conftest import ROOT
from tests.made_runs import made_settings, make_run
from training.prepare import settle_data, settle_positions, start_from

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


@pytest.mark.parametrize("model", ["dit", "maskdit", "lightningdit"])
def test_another_resolution_keeps_its_coordinates(model, tmp_path):
    """Where two grids have tokens at the same place, the positions there are equal, and all weights are."""
    keys = [*TINY, f"model={model}", "data.channels=1"]
    folder = make_run(tmp_path / "old", [*keys, "data.input_size=16"])
    settings = made_settings([*keys, "data.input_size=[32,16]", f"init_from={folder}"])
    settings = settle_positions(settings, None)
    assert settings.model["positions_from"] == [16, 16]
    net, old = build_network(settings), load_run(folder, device="cpu").model
    told = start_from(str(folder), net, EDM(), settings.data)
    assert told == "latents of 16 x 16 become 32 x 16; the coordinates of tokens are scaled"
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), old.parameters(), strict=True))
    buffers = dict(net.named_buffers())
    for name, fixed in old.named_buffers():
        if fixed.ndim == 3 and fixed.shape[1] == 16:  # of 4 x 4 tokens: every other row of 8 x 4
            assert torch.equal(buffers[name].unflatten(1, (8, 4))[:, ::2].flatten(1, 2), fixed), name
    saved = make_run(tmp_path / "new", [*keys, "data.input_size=[32,16]", "+model.positions_from=[16,16]"])
    again = load_run(saved, device="cpu").model  # as sampling does
    assert all(torch.equal(buffers[name], b) for name, b in again.named_buffers() if b.ndim == 3)
    (step,) = saved.glob("checkpoints/step_*")
    assert settle_positions(made_settings([*keys, "data.input_size=[32,16]", "init_from=gone"]), step).model[
        "positions_from"
    ] == [16, 16]
    third = made_settings([*keys, "data.input_size=64", f"init_from={saved}"])
    assert settle_positions(third, None).model["positions_from"] == [16, 16]
    back = made_settings([*keys, "data.input_size=16", f"init_from={folder}"])
    assert settle_positions(back, None) is back


@pytest.mark.parametrize("model", ["dit", "maskdit", "sprint"])
def test_as_many_tokens_on_another_grid_are_at_their_own_places(model, tmp_path):
    keys = [*TINY, f"model={model}", "data.channels=1", "model.size=DiT-XS/4"]
    folder = make_run(tmp_path / "old", [*keys, "data.input_size=[16,32]"])
    settings = settle_positions(made_settings([*keys, "data.input_size=[32,16]", f"init_from={folder}"]), None)
    net, fresh, old = build_network(settings), build_network(settings), load_run(folder, device="cpu").model
    start_from(str(folder), net, EDM(), settings.data)
    for name, buffer in net.named_buffers():
        its_own = (old if name == "mask_token" else fresh).get_buffer(name)
        assert torch.equal(buffer, its_own), name


def test_a_network_that_takes_no_positions_is_given_none(tmp_path, monkeypatch):
    settings = made_settings([*TINY, "data.input_size=32", f"init_from={make_run(tmp_path / 'old', TINY)}"])
    assert settle_positions(settings, None).model["positions_from"] == [28, 28]
    monkeypatch.setattr("training.prepare.class_of", lambda *_: Network)
    assert settle_positions(settings, None) is settings


def test_what_a_config_says_of_positions_and_classes_is_no_index(tmp_path):
    folder = make_run(tmp_path / "old", TINY)
    (step,) = folder.glob("checkpoints/step_*")
    values, settings = yaml.safe_load((step / "config.yaml").read_text()), made_settings([*TINY, "init_from=gone"])
    for odd, said in ((None, ""), ("ab", "model.positions_from=ab; needed: "), (2.5, "positions_from=2.5; needed: ")):
        (step / "config.yaml").write_text(yaml.safe_dump(values | {"model": values["model"] | {"positions_from": odd}}))
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
            assert settle_positions(settings, step) is settings
    run = load_run(make_run(tmp_path / "other", TINY), device="cpu")
    claimed = replace(run.settings.data, num_classes=1000, classes=tuple("abcdefghijk"))  # the network has 10
    run.settings = replace(run.settings, data=claimed)
    tensors, told = with_classes(run, replace(claimed, num_classes=2, classes=("k", "a")))
    table = run.model.y_embedder.embedding_table.weight
    assert torch.equal(tensors["y_embedder.embedding_table.weight"], table[[10, 0, 10]])
    assert told == "10 classes become 2; 1 kept by name: a; new ones begin as no label"


def draw(folder, count=30, side=40):
    """Pictures of colours between two, and of sizes from side x side on, in two classes."""
    for i, name in enumerate(["a cat", "dog"] * (count // 2)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side + i, side), (8 * i, 255 - 8 * i, 0)).save(folder / name / f"{i}.png")
    return folder


def settled(folder, **given):
    """As train.py has data=pictures data.path=folder data.<given>=..."""
    section = cli.load_config("config", ["data=pictures", f"data.path={folder}"])["data"]
    return data.settle_pictures(section | given)


def prepared(found, on_error="stop"):
    data.prepare_pictures(found["path"], found["source"], found["input_size"], found["codec"], on_error)


def test_one_command_trains_on_a_folder_and_another_draws_a_class_by_its_name(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in draw(tmp_path / "pets").rglob("*")}
    keys = [*TINY, "train.compile=off", "train.max_steps=1", "train.val_samples=2"]
    command = [sys.executable, f"{ROOT}/train.py", "data=pictures", "data.path=pets", *keys]
    done = started.run(command, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    made = "datasets/pets is made once of pets: 30 pictures in 32 x 32 pixels, 3 of them for validation"
    assert made in done.stdout and "1 steps are 2.37 passes over the samples" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pets").rglob("*")} == before
    meta = json.loads((tmp_path / "datasets/pets/meta.json").read_text())
    assert meta["classes"] == ["a cat", "dog"] and meta["counts"] == {"train": 27, "val": 3}
    shard = tmp_path / "datasets/pets/train-000000.tar"
    written = shard.stat().st_mtime_ns
    again = started.run([*command, "resume=auto"], cwd=tmp_path, timeout=100)
    assert again.returncode == 0 and "made once" not in again.stdout and shard.stat().st_mtime_ns == written
    drawn = [f"{ROOT}/sample.py", "ckpt=runs/pets-tread-XS4-edm", "class_idx=a cat", "seeds=0", "steps=2"]
    assert started.run([sys.executable, *drawn], cwd=tmp_path, timeout=100).returncode == 0


@pytest.mark.parametrize(("side", "chosen"), [(9, 16), (28, 28), (31, 28), (32, 32), (300, 64)])
def test_the_size_is_one_that_half_of_the_pictures_reach(side, chosen, tmp_path):
    found = settled(draw(tmp_path / "pets", side=side))
    assert found["input_size"] == chosen and (found["channels"], found["num_classes"], found["name"]) == (3, 2, "pets")


def test_pixels_and_labels_are_the_pictures(tmp_path, monkeypatch):
    folder = draw(tmp_path / "pets", side=16)
    monkeypatch.chdir(tmp_path)
    prepared(found := settled(folder))
    latents = [data.open_latents(found["path"], split=split) for split in ("train", "val")]
    for raw, labels in (part.read(range(len(part))) for part in latents):
        red = ((raw[:, 0].mean((1, 2)) + 1) * 127.5 / 8).round().long()  # the number of the picture
        assert torch.equal(labels, red % 2)


def test_latents_are_the_named_vaes(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    shape = dict(block_out_channels=[4, 4], norm_num_groups=2, latent_channels=4, scaling_factor=2.0, shift_factor=0.25)
    AutoencoderKL(**blocks, **shape, layers_per_block=1).save_pretrained("vae")
    codec = {"path": "vae", "scale": None, "bias": None}
    found = settled(draw(tmp_path / "pets", side=64), codec=codec)
    assert (found["channels"], found["input_size"]) == (4, 32)
    assert found["codec"] == {"_target_": "autoencoder.VAECodec", "path": "vae", "scale": 2.0, "bias": -0.5}
    prepared(found)
    latents = data.open_latents(found["path"])
    assert tuple(latents.shape) == (4, 32, 32) and latents.meta["codec"] == found["codec"]
    prepared(plain := settled(tmp_path / "pets", name="plain", codec=codec | {"scale": 1.0, "bias": 0.0}))
    z = data.open_latents(plain["path"]).read(range(5))[0].float()
    torch.testing.assert_close(latents.read(range(5))[0].float(), 2 * z - 0.5, atol=0.02, rtol=0.01)
    Path("vae").rename("elsewhere")
    moved = settled(tmp_path / "pets", codec=codec | {"path": "elsewhere"})
    prepared(moved)
    own = ["data=pictures", f"data.path={moved['path']}", "data.num_classes=2", "data.channels=4", "data.input_size=32"]
    keys = [f"data.codec.path={moved['codec']['path']}", "data.codec._target_=autoencoder.VAECodec", "data.name=pets"]
    assert settle_data(made_settings([*own, *keys]), latents).data.codec == moved["codec"]
    AutoencoderKL(**blocks, **shape, layers_per_block=1).save_pretrained("another")
    with pytest.raises(UserError, match="data.codec.path=another, and .* says vae"):
        settle_data(made_settings([*own, *keys, "data.codec.path=another"]), latents)


@pytest.mark.parametrize(
    ("damage", "given", "said"),
    [
        (lambda pets: None, {"path": "none"}, "none is not there"),
        (lambda pets: [p.unlink() for p in sorted(pets.rglob("*.png"))[5:]], {}, "holds 5 pictures; needed: 20"),
        (lambda pets: (pets / "dog/7.png").write_bytes(b"?"), {}, "dog/7.png is no image or is damaged"),
        (lambda pets: None, {"input_size": [32, 16]}, "data.input_size=[32, 16]; needed: a whole number"),
        (lambda pets: None, {"name": "../pets"}, "data.name names a file '../pets'"),
        (lambda pets: None, {"path": "."}, "would lie among the pictures; needed: data.name="),
        (lambda pets: None, {"condition": "text"}, "captions: scripts/encode_latents.py"),
    ],
    ids=["none", "five", "broken", "oblong", "name", "inside", "captions"],
)  # fmt: skip
def test_bad_folders_get_one_line(damage, given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    damage(draw(tmp_path / "pets"))
    with pytest.raises(SystemExit) as refused, cli.user_errors():
        prepared(settled("pets", **given))
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and said in error, error


def test_the_first_picture_too_may_be_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (draw(tmp_path / "pets") / "a cat" / "0.png").write_bytes(b"?")
    with pytest.raises(UserError, match="a cat/0.png .*damaged.*; needed: data.on_error=skip, or the picture deleted"):
        prepared(settled("pets"))
    prepared(found := settled("pets"), "skip")
    assert sum(len(data.open_latents(found["path"], split=split)) for split in ("train", "val")) == 29


def test_a_set_moves_with_its_pictures_and_knows_others_of_the_same_names(tmp_path, monkeypatch):
    draw(tmp_path / "here" / "pets")
    monkeypatch.chdir(tmp_path / "here")
    prepared(settled("pets"))
    monkeypatch.chdir((tmp_path / "here").rename(tmp_path / "there"))
    written = Path("datasets/pets/train-000000.tar").stat().st_mtime_ns
    prepared(settled("pets"))
    assert Path("datasets/pets/train-000000.tar").stat().st_mtime_ns == written
    Image.new("RGB", (40, 40)).save("pets/dog/7.png")
    with pytest.raises(UserError, match="datasets/pets was begun with pictures="):
        prepared(settled("pets"))


def test_one_class_works_and_is_said_and_changed_pictures_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "pets")
    prepared(found := settled(draw(tmp_path / "more", count=60) / "dog"))
    assert found["num_classes"] == 1 and "has one class alone" in capsys.readouterr().out
    (tmp_path / "pets/dog/7.png").write_bytes(b"?")
    with pytest.raises(UserError, match="damaged"):
        prepared(settled("pets"))
    (tmp_path / "pets/dog/7.png").unlink()
    prepared(settled("pets"))  # begun anew
    (tmp_path / "pets/dog/7.png").write_bytes(b"?")
    with pytest.raises(UserError, match="datasets/pets was begun with number=29, not 30"):
        prepared(settled("pets"))
    prepared(settled("pets", name="skipped"), "skip")
    meta = json.loads((tmp_path / "datasets/skipped/meta.json").read_text())
    assert sum(meta["counts"].values()) == 29 and "left out" in capsys.readouterr().err
