"""Captions: encoded, several to an image, normalised, beside pictures, and in U-ViT's folder of COCO."""

import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data.__main__
import data.texts
from checkpoints.generate import generate_latents, sampler_of
from checkpoints.load import load_run
from conditions import normalize, rows
from data import BatchPlan, make_loader, open_latents
from data.archives import open_tree, read_npy
from data.encoding import LatentEncoding
from data.images import open_images
from data.inspect import inspect
from data.shards import finalize, read_manifest, shard_name, write_shard
from data.texts import captioned
from guidance import Guidance
from scripts import encode_latents
from system import UserError
from system.files import sha256_of
from tests import started
from tests.conftest import ROOT
from tests.made_sets import array_of, npy, numbers_in, write_members
from tests.made_texts import MadeEncoder

ENCODER = MadeEncoder()
BOMS = "utf-8", "utf-8-sig"  # some editors begin a file with a mark, which is no part of the caption


def captions_of(i: int) -> list[str]:
    """1 to 3 captions of 1 to 4 words."""
    return [" ".join(["an", f"image{i}", "said", f"time{j}"][: 1 + (i + j) % 4]) + f" {j}" for j in range(1 + i % 3)]


def write_captions(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True)
    texts = captioned(ENCODER, {i: captions_of(i) for i in range(count)})
    for shard, part in enumerate(np.array_split(np.arange(count), 3)):
        samples = ((f"{i:04d}", array_of(i), texts[i]) for i in part.tolist())
        write_shard(folder / shard_name("train", shard), samples)
    finalize(folder, LatentEncoding("sample_scaled"), condition=ENCODER.source)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions") / "set")


def which(latents, raw, text) -> list[tuple[int, int]]:
    """(sample, number of its caption) of each row of a batch."""
    found = []
    for i, states, mask in zip(numbers_in(raw), *text):
        known = [normalize(ENCODER([caption]), latents.text_stats) for caption in captions_of(i)]
        found.append((i, next(j for j, k in enumerate(known) if torch.equal(k.states[0], states))))
        assert torch.equal(mask, known[found[-1][1]].mask[0]) and not states[~mask].any()
    return found


def test_captions_stay_beside_their_states(folder):
    tree = open_tree(folder / "train-000000.tar")
    assert [tree.read(f"{i:04d}.txt").decode().splitlines() for i in range(4)] == [captions_of(i) for i in range(4)]
    for j, caption in enumerate(captions_of(2)):
        states = read_npy(tree.read("0002.text.npy" if j == 0 else f"0002.text.{j}.npy"), "x")
        text = ENCODER([caption])
        np.testing.assert_array_equal(states, text.states[text.mask].numpy())
    manifest = read_manifest(folder)
    known = {"text_count": 3, "text_length": 6, "text_encoder": "made", "text_sha256": "0" * 64, "text_width": 8}
    assert {key: manifest[key] for key in known} == known
    assert {key: inspect(folder)[key] for key in ("text_count", "text_encoder")} == {
        "text_count": 3,
        "text_encoder": "made",
    }


def test_texts_are_normalised_by_the_training_captions(folder, tmp_path):
    latents = open_latents(folder, condition="text")
    tokens = np.concatenate([states for i in range(40) for states in captioned(ENCODER, {i: captions_of(i)})[i].states])
    mean, std = (getattr(tokens.astype(np.float64), name)(0) for name in ("mean", "std"))
    np.testing.assert_allclose(latents.text_stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(latents.text_stats.std[:-1], std[:-1], rtol=1e-5)
    text = latents.read(range(40), draws=[0.9] * 40)[1]
    last = np.concatenate([captioned(ENCODER, {0: captions_of(i)[-1:]})[0].states[0] for i in range(40)])
    np.testing.assert_allclose(text.states[text.mask][:, :-1], ((last - mean) / std.clip(1e-9))[:, :-1], atol=2e-3)
    assert text.states.dtype == torch.float16
    assert float(latents.text_stats.std[-1]) == pytest.approx(float(latents.text_stats.std.median()) / 100, rel=1e-5)
    assert text.states[text.mask][:, -1].abs().max() < 1e-2  # a constant dimension is no noise
    assert torch.equal(latents.text_stats.null, ENCODER([""]).states[0, :1])
    other = write_captions(tmp_path / "other")
    assert open_latents(other, condition="text").fingerprint == latents.fingerprint
    stats = load_file(other / "texts.safetensors")
    assert stats.keys() == {"mean", "std", "null"}
    (other / "texts.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="texts.safetensors is missing or has changed"):
        open_latents(other, condition="text")
    assert open_latents(other, condition="none").read([0])[1] is None


def test_one_caption_is_drawn_by_seed_and_step(folder):
    latents = open_latents(folder, condition="text")
    steps = dict(num_steps=30, seed=3)
    whole = [which(latents, *batch) for batch in make_loader(latents, BatchPlan(8, 8, 1, 0, 1), **steps)]
    for workers, start in ((2, 0), (0, 13)):
        loader = make_loader(latents, BatchPlan(8, 8, 1, 0, 1), num_workers=workers, start_step=start, **steps)
        assert [which(latents, *batch) for batch in loader] == whole[start:]
    parts = [list(make_loader(latents, BatchPlan(8, 2, 2, rank, 2), **steps)) for rank in (0, 1)]
    joined = [
        sum((which(latents, *parts[rank][2 * step + micro]) for micro in (0, 1) for rank in (0, 1)), [])
        for step in range(30)
    ]
    assert joined == whole
    drawn, held = {pair for batch in whole for pair in batch}, sum(len(captions_of(i)) for i in range(40))
    assert 0.8 * held < len(drawn) < held  # in six epochs
    other = make_loader(latents, BatchPlan(8, 8, 1, 0, 1), num_steps=30, seed=4)
    assert [which(latents, *batch) for batch in other] != whole
    assert which(latents, *latents.read(range(9))) == [(i, 0) for i in range(9)]  # without draws, the first


@pytest.mark.parametrize("defect, said", [
    ({1: npy(np.zeros((2, 9), np.float16))}, r"has a .text.1.npy that is float16 \(2, 9\); needed: float16 \(1.*, 8\)"),
    ({0: None}, "has no .text.npy"),
])  # fmt: skip
def test_a_bad_caption_is_named(defect, said, tmp_path):
    texts = [npy(np.ones((2, 8), np.float16))] * 2
    sound = [("0001.latent.npy", npy(array_of(1))), ("0001.text.npy", texts[0])]
    bad = {j: defect.get(j, text) for j, text in enumerate(texts)}
    members = [("0002.latent.npy", npy(array_of(2)))]
    members += [(f"0002.text.{f'{j}.' if j else ''}npy", text) for j, text in bad.items() if text]
    write_members(tmp_path / "train-0.tar", sound + members)
    with pytest.raises(UserError, match=said):
        finalize(tmp_path, LatentEncoding("sample_scaled"), condition="text")


# Pictures with captions


@pytest.fixture
def pictures(tmp_path) -> dict[str, Path]:
    """The same pictures with captions in a folder and in a tar."""
    (tmp_path / "folder/some").mkdir(parents=True)
    (tmp_path / "tars").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"folder/some/{i}.png")
        (tmp_path / f"folder/some/{i}.txt").write_bytes(("\n".join(captions_of(i)) + "\n\n").encode(BOMS[i % 2]))
    with tarfile.open(tmp_path / "tars/train-0.tar", "w") as tar:
        for path in sorted((tmp_path / "folder/some").iterdir()):
            tar.add(path, path.name)
    return {name: tmp_path / name for name in ("folder", "tars")}


class MadeVae:
    """In the place of a VAE: the pixels' means."""

    vae = torch.nn.Linear(1, 1)

    def __init__(self, *arguments):
        pass

    def to(self, device):
        return self

    def moments(self, pixels):
        mean = pixels.float().mean(1, keepdim=True)[..., ::4, ::4].expand(-1, 4, -1, -1)
        return mean / 127.5 - 1, torch.full_like(mean, -30.0)


@pytest.fixture
def encode(monkeypatch):
    monkeypatch.setattr(encode_latents, "VAECodec", MadeVae)
    monkeypatch.setattr(encode_latents, "load_encoder", lambda name, length, device: MadeEncoder(length))
    return lambda images, out, *more: encode_latents.main([f"images={images}", f"out={out}", "vae=x", "size=16", *more])


def test_pictures_become_shards_with_their_captions(pictures, encode, tmp_path, capsys):
    for name, path in pictures.items():
        encode(path, tmp_path / f"from {name}", "text=made", "text_length=6", "val=2", "shard_size=2", "flip=both")
    assert "with texts" in (said := capsys.readouterr()).out and "left out" not in said.err
    sets = [sorted((tmp_path / f"from {name}").glob("*.tar")) for name in pictures]
    assert [p.read_bytes() for p in sets[0]] == [p.read_bytes() for p in sets[1]] and len(sets[0]) == 3
    latents = open_latents(tmp_path / "from tars", condition="text")
    for key, text in zip(latents.keys(range(8)), zip(*latents.read(range(8))[1])):
        first = normalize(ENCODER(captions_of(int(key.removesuffix("-flip")))[:1]), latents.text_stats)
        assert torch.equal(text[0], first.states[0]) and torch.equal(text[1], first.mask[0])
    with pytest.raises(UserError, match="was begun with text=made, not other; needed: the same settings"):
        encode(
            pictures["tars"],
            tmp_path / "from tars",
            "text=other",
            "text_length=6",
            "val=2",
            "shard_size=2",
            "flip=both",
        )


def test_pictures_without_captions_are_refused(pictures, encode, tmp_path):
    (pictures["folder"] / "some/3.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"picture some/3.png has 0 captions; needed: 1 to 99 lines in some/3.txt"):
        encode(pictures["folder"], tmp_path / "out", "text=made")
    (pictures["folder"] / "some/3.txt").write_text("a" * (1 << 20))
    with pytest.raises(UserError, match="some/3.txt has a caption of 1048576 letters; needed: at most 65536"):
        encode(pictures["folder"], tmp_path / "out", "text=made")
    with pytest.raises(UserError, match="train-0.tar has no labels; needed: <key>.cls beside each picture"):
        encode(pictures["tars"], tmp_path / "out")
    with pytest.raises(UserError, match="labels or captions, become latents by scripts/encode_latents.py"):
        data.__main__.main(["convert", str(pictures["tars"]), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert open_images(pictures["tars"], beside="txt").captions == [captions_of(i) for i in range(6)]


# U-ViT's folder of COCO


def write_coco(folder: Path, train: int = 270, val: int = 30) -> Path:
    """Image i of a split has 1 to 3 captions; all as U-ViT's scripts write them, but small."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            moments = rng.standard_normal((8, 8, 8)).astype(np.float32)
            np.save(folder / split / f"{i}.npy", moments - np.array([0, 6], np.float32).repeat(4)[:, None, None])
            for j in range(1 + i % 3):
                np.save(folder / split / f"{i}_{j}.npy", 2 * rng.standard_normal((5, 12)).astype(np.float32))
    np.save(folder / "empty_context.npy", rng.standard_normal((5, 12)).astype(np.float32))
    (folder / "run_vis").mkdir()
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> tuple[Path, Path]:
    """U-ViT's folder, and what it converts to."""
    source = write_coco(tmp_path_factory.mktemp("coco") / "mscoco")
    assert data.__main__.main(["convert", str(source), str(source.parent / "set"), "shard_size=100", "workers=1"]) == 0
    return source, source.parent / "set"


def test_uvit_converts_byte_for_byte(coco):
    source, folder = coco
    manifest, seen = read_manifest(folder), 0
    assert manifest["counts"] == {"train": 270, "val": 30} and manifest["kind"] == "moments_logvar"
    assert (manifest["text_count"], manifest["text_length"], manifest["text_dtype"]) == (3, 5, "float32")
    for shard in folder.glob("*.tar"):
        tree = open_tree(shard)
        for name in tree.names:
            key, _, kind = name.partition(".")
            split, number = ("train", int(key)) if int(key) < 270 else ("val", int(key) - 270)
            assert shard.name.startswith(split)
            caption = {"latent.npy": "", "text.npy": "_0"}.get(kind, f"_{kind.split('.')[1]}")
            assert tree.read(name) == (source / split / f"{number}{caption}.npy").read_bytes()
            seen += 1
    assert seen == len([*source.glob("*/*.npy")])
    stats = open_latents(folder, condition="text").text_stats
    np.testing.assert_array_equal(stats.null.numpy(), np.load(source / "empty_context.npy"))
    report = inspect(source)
    assert (report["format"], report["counts"], report["text_width"]) == ("uvit", {"train": 270, "val": 30}, 12)


def test_a_part_of_uvits_folder(coco, tmp_path):
    assert (
        data.__main__.main(
            ["convert", str(coco[0] / "val"), str(tmp_path / "set"), "val=10", "dtype=float16", "workers=1"]
        )
        == 0
    )
    manifest = read_manifest(tmp_path / "set")
    assert manifest["counts"] == {"train": 20, "val": 10} and manifest["text_dtype"] == manifest["dtype"] == "float16"


@pytest.mark.parametrize("lost, said", [
    ("train/4_0.npy", "train: image 4 lacks its latents or a caption; needed: 4.npy, and 4_0.npy"),
    ("train/5_1.npy", "train: image 5 lacks"), ("val/3_0.npy", "val: image 3 lacks"),
    ("val/2.npy", "val: image 2 lacks"),
    ("empty_context.npy", "has no empty_context.npy, the states of no caption"),
])  # fmt: skip
def test_what_uvits_folder_lacks_is_named(lost, said, tmp_path):
    source = write_coco(tmp_path / "mscoco", 8, 6)
    (source / lost).unlink()
    with pytest.raises(UserError, match=said):
        data.__main__.main(["convert", str(source), str(tmp_path / "set")])
    assert not (tmp_path / "set").exists()


def test_odd_states_of_uvit_are_refused(tmp_path):
    source = write_coco(tmp_path / "mscoco", 8, 6)
    with pytest.raises(UserError, match="val=2, and .* has 6 images for validation; needed: val=0"):
        data.__main__.main(["convert", str(source), str(tmp_path / "set"), "val=2"])
    np.save(source / "train/3_0.npy", np.zeros((5, 11), np.float32))
    with pytest.raises(UserError, match=r"has a .text.npy that is float32 \(5, 11\)|is float32 \(5, 12\)"):
        data.__main__.main(["convert", str(source), str(tmp_path / "set"), "workers=1"])
    np.save(source / "train/3_0.npy", np.zeros(12, np.float32))
    with pytest.raises(UserError, match=r"3_0.npy: holds float32 \(12,\); needed: float16 or float32 \(T, D\)"):
        data.__main__.main(["convert", str(source), str(tmp_path / "other"), "workers=1"])


def test_uvits_captions_train_resume_and_sample(coco, tmp_path):
    def train(*more: str) -> Path:
        keys = [
            "data=folder", f"data.path={coco[1]}", "data.input_size=8", "data.condition=text", "data.text_width=12",
            "data.text_length=5", "data.num_classes=null", "data.num_workers=0", "model=tread", "model.size=DiT-XS/2",
            "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=8",
            "train.val_every=0", "train.compile=off", "train.precision=fp32", "train.save_every=2",
            "preview.every=0",
            f"results_dir={tmp_path}", "run_name=whole", *more,
        ]  # fmt: skip
        done = started.run([sys.executable, str(ROOT / "train.py"), *keys])
        assert done.returncode == 0, done.stderr
        return tmp_path / "whole/checkpoints/step_0000004"

    whole = train("train.max_steps=4")
    (whole.parent / "step_0000004").rename(whole.parent / "kept")
    (whole.parent / "latest").write_text("step_0000002\n")
    resumed = train("train.max_steps=4")
    for name in ("model.safetensors", "ema.safetensors", "conditions.safetensors"):
        assert (resumed / name).read_bytes() == (resumed.parent / "kept" / name).read_bytes()
    kept = load_file(resumed / "conditions.safetensors")
    assert {*kept} == {"states", "mask", "mean", "std", "null"} and kept["states"].shape == (30, 5, 12)
    command = [sys.executable, str(ROOT / "sample.py"), f"ckpt={resumed}", f"out={tmp_path / 'samples'}", "seeds=0-1"]
    done = started.run([*command, "steps=2", "codec.path=nowhere"])
    assert done.returncode == 2 and "VAE 'nowhere' was not found" in done.stderr, done.stderr
    run = load_run(resumed, device="cpu")
    sampler = sampler_of(run, 2)
    latents = [generate_latents(run, Guidance(scale=s), [0, 1], rows(run.pool, [0, 1]), sampler) for s in (1.0, 2.0)]
    assert latents[0].isfinite().all() and not torch.equal(*latents)


def test_statistics_that_cannot_be_used_are_refused(folder, tmp_path):
    shutil.copytree(folder, other := tmp_path / "set")
    for named in ({"x": torch.zeros(1)}, dict(mean=torch.zeros(9), std=torch.ones(9), null=torch.zeros(1, 9))):
        save_file(named, other / "texts.safetensors")
        about = read_manifest(folder) | {"text_stats": sha256_of(other / "texts.safetensors")}
        (other / "meta.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="texts.safetensors is of other texts; needed: statistics of width 8"):
            open_latents(other, condition="text")
