"""Each project's latents, written here as its own scripts write them, read to the right tensors, labels and scale."""

import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.convert import Conversion, convert, plan_shards
from data.foreign import SD_SCALE, open_source
from data.foreign.pickled import read_pickled_array
from data.inspect import inspect
from data.shards import open_latents
from system import UserError
from system.settings import parse
from tests import started

ROOT = Path(__file__).resolve().parent.parent
N, LABELS = 6, [3, 0, 3, 1, 2, 0]


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def moments_logvar(i: int) -> np.ndarray:
    """(8, 4, 4) float32 as an SD encoder has them: mean, then log variance."""
    r = rng(1, i)
    return np.concatenate([5 * r.standard_normal((4, 4, 4)), r.uniform(-18, -8, (4, 4, 4))]).astype(np.float32)


def mean_std(i: int) -> np.ndarray:
    r = rng(2, i)
    return np.concatenate([5 * r.standard_normal((4, 4, 4)), r.uniform(0.001, 0.1, (4, 4, 4))]).astype(np.float32)


# --- writers: what each project's scripts leave on the disk ---------------------------------------


def write_maskdit_lmdb(root: Path, xflip: bool = False) -> None:
    lmdb = pytest.importorskip("lmdb")
    (root / "train").mkdir(parents=True)
    with lmdb.open(str(root / "train"), map_size=1 << 24, readahead=False) as env, env.begin(write=True) as txn:
        index = 0
        for mirrored in (False, True) if xflip else (False,):
            for i in range(N):
                z = moments_logvar(i)
                txn.put(f"z-{index}".encode(), np.ascontiguousarray(z[..., ::-1] if mirrored else z))
                txn.put(f"y-{index}".encode(), str(np.int64(LABELS[i])).encode())
                index += 1
        txn.put(b"length", str(index).encode())


def write_wds(path: Path, samples: list[dict[str, bytes]]) -> None:
    """As webdataset's TarWriter: a fractional time, which makes tarfile write a pax header in front of each member."""
    with tarfile.open(path, "w|") as tar:
        for number, sample in enumerate(samples):
            for extension, contents in sample.items():
                info = tarfile.TarInfo(f"{number:07d}.{extension}")
                info.size, info.mtime, info.mode = len(contents), 1700000000.25, 0o444
                info.uname = info.gname = "bigdata"
                tar.addfile(info, io.BytesIO(contents))


def write_maskdit_wds(root: Path, protocol: int | None = None) -> None:
    root.mkdir()
    samples = [
        {"cls": str(LABELS[i]).encode(), "latent": pickle.dumps(moments_logvar(i), protocol)}
        for i in range(N)
    ]  # fmt: skip
    write_wds(root / "latent_imagenet_512_train-0000.tar", samples)


def write_numbered(root: Path, prefix: str, array, labels: bool = True) -> None:
    entries = []
    for i in range(N):
        name = f"{i // 1000:05d}/{prefix}{i:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, array(i))
        entries.append([name, LABELS[i]])
    (root / "dataset.json").write_text(json.dumps({"labels": entries if labels else None}))


def write_edm2_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(N):
            buffer = io.BytesIO()
            np.save(buffer, mean_std(i))
            archive.writestr(f"00000/img-mean-std-{i:08d}.npy", buffer.getvalue())
        labels = [[f"00000/img-mean-std-{i:08d}.npy", LABELS[i]] for i in range(N)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def sample_f16d32(i: int) -> np.ndarray:
    return (3 * rng(3, i).standard_normal((1, 32, 2, 2))).astype(np.float32)


def sample_scaled(i: int) -> np.ndarray:
    return rng(4, i).standard_normal((1, 4, 4, 4)).astype(np.float32)


def write_fastdit(root: Path) -> None:
    for kind in ("features", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True)
    for i in range(N):
        np.save(root / f"imagenet256_features/{i}.npy", sample_scaled(i))
        np.save(root / f"imagenet256_labels/{i}.npy", np.array([LABELS[i]]))


LIGHTNING_MEAN, LIGHTNING_STD = torch.linspace(-1, 1, 32).view(1, 32, 1, 1), torch.linspace(2, 5, 32).view(1, 32, 1, 1)


def write_lightningdit(root: Path) -> None:
    from safetensors.torch import save_file

    root.mkdir()
    for shard, images in enumerate((range(4), range(4, N))):
        latents = torch.cat([torch.from_numpy(sample_f16d32(i)) for i in images])
        tensors = {"latents": latents, "latents_flip": -latents, "labels": torch.tensor([LABELS[i] for i in images])}
        save_file(
            tensors, root / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"total_size": str(len(images))}
        )
    torch.save({"mean": LIGHTNING_MEAN, "std": LIGHTNING_STD}, root / "latents_stats.pt")


def write_npy(root: Path) -> None:
    for i in range(N):
        (root / f"class{LABELS[i]}").mkdir(parents=True, exist_ok=True)
        np.save(root / f"class{LABELS[i]}/{i}.npy", sample_scaled(i)[0].astype(np.float16))


EDM2_SCALE = 0.5 / np.array([4.17, 4.62, 3.71, 3.28])
EDM2_BIAS = -np.array([5.81, 3.25, 0.12, -2.15]) * EDM2_SCALE

# name: (writer, path below the folder, kind, stored array of image i, scale, bias, options that the format leaves open)
CASES = {
    "maskdit_lmdb": (write_maskdit_lmdb, "moments_logvar", moments_logvar, SD_SCALE, 0.0, {}),
    "maskdit_wds": (write_maskdit_wds, "moments_logvar", moments_logvar, SD_SCALE, 0.0, {}),
    "repa": (
        lambda p: write_numbered(p / "vae-sd", "img-mean-std-", mean_std),
        "mean_std", mean_std, SD_SCALE, 0.0, {},
    ),
    "edm2": (lambda p: write_numbered(p, "img-mean-std-", mean_std), "mean_std", mean_std, EDM2_SCALE, EDM2_BIAS, {}),
    "speedrundit": (
        lambda p: write_numbered(p / "vae-in", "img-latents-", sample_f16d32),
        "sample_raw", lambda i: sample_f16d32(i)[0], 0.3099, 0.0, {},
    ),
    "fastdit": (write_fastdit, "sample_scaled", lambda i: sample_scaled(i)[0], 1.0, 0.0, {}),
    "lightningdit": (
        write_lightningdit, "sample_raw", lambda i: sample_f16d32(i)[0],
        1 / LIGHTNING_STD.flatten().numpy(), (-LIGHTNING_MEAN / LIGHTNING_STD).flatten().numpy(), {},
    ),
    "npy": (
        write_npy, "sample_scaled", lambda i: sample_scaled(i)[0].astype(np.float16), 1.0, 0.0,
        {"kind": "sample_scaled"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory):
    """(case name, source folder, folder of shards)."""
    folder = tmp_path_factory.mktemp(request.param)
    write, *_, options = CASES[request.param]
    write(folder / "source")
    convert(str(folder / "source"), str(folder / "shards"), Conversion(shard_size=4, workers=1, **options))
    return request.param, folder / "source", folder / "shards"


def by_image(latents) -> dict[str, int]:
    return {key: i for i, key in enumerate(latents.keys(range(len(latents))))}


def test_arrays_and_labels_are_the_sources(converted):
    name, _, shards = converted
    stored = CASES[name][2]
    latents = open_latents(shards)
    places = by_image(latents)
    order = sorted(range(N), key=lambda i: (LABELS[i], i)) if name == "npy" else range(N)  # npy: sorted by path
    for image, i in enumerate(order):
        raw, y = latents.read([places[f"{image:08d}"]])
        np.testing.assert_array_equal(raw[0].numpy(), stored(i))
        assert y.tolist() == [LABELS[i]]
    assert latents.num_classes == 4 and latents.kind == CASES[name][1]


def test_model_input_has_the_sources_scale(converted):
    """The mean of many draws is (mean or sample) * scale + bias, and their spread std * scale."""
    name, _, shards = converted
    _, kind, _, scale, bias, _ = CASES[name]
    latents = open_latents(shards)
    raw, _ = latents.read([0])
    generator = torch.Generator().manual_seed(0)
    draws = latents.to_model_input(raw.expand(4000, -1, -1, -1), generator).double()
    stored, scale, bias = raw[0].double(), torch.as_tensor(scale).view(-1, 1, 1), torch.as_tensor(bias).view(-1, 1, 1)
    if kind in ("moments_logvar", "mean_std"):
        mean, spread = stored.chunk(2)
        std = spread if kind == "mean_std" else (spread / 2).exp()
        torch.testing.assert_close(draws.std(dim=0), std * scale, rtol=0.08, atol=0)
        torch.testing.assert_close(draws.mean(dim=0), mean * scale + bias, rtol=0, atol=0.01)
    else:
        torch.testing.assert_close(draws[0], stored * scale + bias, rtol=1e-5, atol=1e-5)


def test_inspect_knows_the_format(converted):
    name, source, shards = converted
    report = inspect(source)
    assert (report["format"], report["kind"], report["wrong"]) == (name, CASES[name][1], [])
    assert f"format={name}" in report["next"] and report["num_classes"] == 4
    made = inspect(shards)
    assert (made["kind"], made["shape"], made["wrong"]) == (report["kind"], report["shape"], [])
    assert made["counts"]["train"] == report["counts"]["train"]


def test_mirror_images_are_second_entries(tmp_path):
    write_maskdit_lmdb(tmp_path / "lmdb", xflip=True)
    write_lightningdit(tmp_path / "lightning")
    for source, mirror in (("lmdb", lambda x: x.flip(-1)), ("lightning", torch.neg)):
        convert(str(tmp_path / source), str(tmp_path / f"{source}-out"), Conversion(workers=1, val=2))
        train, val = (open_latents(tmp_path / f"{source}-out", split=split) for split in ("train", "val"))
        assert (train.meta["flip"], len(train), len(val)) == ("both", 2 * (N - 2), 4)
        for latents in (train, val):  # an image and its mirror image are never on two sides
            places = by_image(latents)
            for key in (key for key in places if not key.endswith("-flip")):
                raw, y = latents.read([places[key], places[f"{key}-flip"]])
                assert torch.equal(mirror(raw[0]), raw[1]) and y[0] == y[1]
        convert(str(tmp_path / source), str(tmp_path / f"{source}-plain"), Conversion(workers=1, flip="none"))
        assert len(open_latents(tmp_path / f"{source}-plain")) == N


def test_edm2_zip(tmp_path):
    write_edm2_zip(tmp_path / "edm2.zip")
    source = open_source(tmp_path / "edm2.zip")
    assert source.format == "edm2" and source.label(4) == LABELS[4]
    np.testing.assert_array_equal(source.array(4, False), mean_std(4))


def test_pickles_of_every_protocol(tmp_path):
    array = mean_std(0)
    for protocol in (2, 3, 4, 5):
        np.testing.assert_array_equal(read_pickled_array(pickle.dumps(array, protocol), "a.latent"), array)
    np.testing.assert_array_equal(read_pickled_array(pickle.dumps(np.asfortranarray(array[0])), "a.latent"), array[0])


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    object_array = np.array([Canary(canary)], dtype=object)
    builtin = b"cbuiltins\neval\n(S'1'\ntR."
    for crafted in (
        pickle.dumps(Canary(canary)),
        pickle.dumps(object_array),
        pickle.dumps([1]),
        builtin,
        b"",
        b"\x80\x04.",
    ):
        with pytest.raises(UserError):
            read_pickled_array(crafted, "a.latent")
    write_wds(tmp_path / "train-0.tar", [{"cls": b"1", "latent": pickle.dumps(Canary(canary))}])
    with pytest.raises(UserError, match="0000000.latent"):
        convert(str(tmp_path / "train-0.tar"), str(tmp_path / "out"), Conversion(workers=1))
    np.save(tmp_path / "canary.npy", object_array, allow_pickle=True)
    with pytest.raises(UserError, match="canary.npy"):
        open_source(tmp_path, "npy").array(0, False)
    assert not canary.exists()


def test_conversion_goes_on_after_an_interruption_and_bytes_repeat(tmp_path, monkeypatch):
    write_fastdit(tmp_path / "source")
    source = str(tmp_path / "source")
    whole = tmp_path / "whole"
    convert(source, str(whole), Conversion(shard_size=2, val=1, workers=2))  # in two processes
    import data.convert as module

    real, calls = module.write_shard, []

    def failing(path, samples):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, samples)

    monkeypatch.setattr(module, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(source, str(tmp_path / "cut"), Conversion(shard_size=2, val=1, workers=1))
    assert not (tmp_path / "cut/meta.json").exists()
    convert(source, str(tmp_path / "cut"), Conversion(shard_size=2, val=1, workers=1))
    assert len(calls) == 5  # 4 shards, the second of them begun twice
    names = sorted(path.name for path in whole.glob("*.tar"))
    assert names == ["train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"]
    for name in [*names, "meta.json"]:
        assert (whole / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    with pytest.raises(UserError, match="shard_size=2, not 3"):
        convert(source, str(whole), Conversion(shard_size=3, val=1))


def test_plan_takes_every_image_once():
    shards = plan_shards(1003, 100, val=50)
    assert sorted(np.concatenate(list(shards.values()))) == list(range(1003))
    assert sum(len(images) for name, images in shards.items() if name.startswith("val")) == 50
    assert max(map(len, shards.values())) == 100


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "add kind=.*perhaps sample_scaled"),
        ({"kind": "sample_raw"}, "need a scale"),
        ({"kind": "sample_raw", "scale": [1.0, 2.0]}, "a list of 4"),
        ({"kind": "sample_raw", "scale": "large"}, "needed: a number"),
        ({"kind": "sample_scaled", "workers": 0}, "workers=0; needed: a whole number"),
        ({"kind": "samples"}, "kind=samples; needed: sample_scaled"),
        ({"kind": "sample_scaled", "scale": 2.0}, "applied already"),
        ({"kind": "sample_scaled", "flip": "both"}, "flip=both"),
        ({"kind": "sample_scaled", "dtype": "int8"}, "float16, float32"),
        ({"kind": "sample_scaled", "val": 6}, "val=6"),
        ({"format": "repa"}, "no latents of format repa"),
        ({"format": "mar"}, "unknown format"),
    ],
)
def test_what_convert_refuses(tmp_path, options, message):
    write_npy(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "source"), str(tmp_path / "out"), parse(Conversion, {"workers": 1, **options}))


def test_damaged_sources_are_named(tmp_path):
    write_npy(tmp_path / "nan")
    np.save(tmp_path / "nan/class0/1.npy", np.full((4, 4, 4), np.nan, np.float16))
    write_npy(tmp_path / "cut")
    path = tmp_path / "cut/class0/1.npy"
    path.write_bytes(path.read_bytes()[:-7])
    write_numbered(tmp_path / "label/vae-sd", "img-mean-std-", mean_std)
    (tmp_path / "label/vae-sd/dataset.json").write_text('{"labels": [["00000/img-mean-std-00000000.npy", 1]]}')
    for name, message in (("nan", "not finite"), ("cut", "class0/1.npy"), ("label", "no label for 00000/img-mean")):
        with pytest.raises(UserError, match=message):
            convert(
                str(tmp_path / name),
                str(tmp_path / f"{name}-out"),
                Conversion(kind=None if name == "label" else "sample_scaled", workers=1),
            )


def test_convert_command(tmp_path):
    write_npy(tmp_path / "source")
    command = [sys.executable, "-m", "data", "convert", str(tmp_path / "source"), str(tmp_path / "out")]
    done = started.run([*command, "kind=sample_scaled", "dtype=float32"])
    assert done.returncode == 0, done.stderr
    assert "6 train entries of sample_scaled (4, 4, 4), 4 classes" in done.stdout


def test_converting_again_does_not_bless_damage(tmp_path):
    write_fastdit(tmp_path / "source")
    arguments = str(tmp_path / "source"), str(tmp_path / "out")
    convert(*arguments, Conversion(shard_size=4, workers=1))
    shard, other = tmp_path / "out/train-000000.tar", tmp_path / "out/train-000001.tar"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:700] + bytes(4) + sound[704:])  # inside the first array
    with pytest.raises(UserError, match="train-000000.tar: sample .* has changed"):
        convert(*arguments, Conversion(shard_size=4, workers=1))
    shard.unlink()
    other.unlink()
    convert(*arguments, Conversion(shard_size=4, workers=1))  # what is missing is written again, to the same bytes
    assert shard.read_bytes() == sound
