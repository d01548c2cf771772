"""Shards with texts, with labels or with latents alone: read, padded, checked and delivered alike."""

import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data.__main__
import data.index
from conditions import Text
from data import BatchPlan, make_loader, open_latents
from data.encoding import LatentEncoding
from data.inspect import inspect
from data.shards import finalize, read_manifest, shard_name, write_shard
from system import UserError
from tests.made_sets import array_of, npy, numbers_in, write_members, write_set
from tests.test_damage import flip_bit

WIDTH, SIZES = 6, (5, 7, 20)
TOTAL = sum(SIZES)


def text_of(i: int) -> np.ndarray:
    """(1 to 4, WIDTH) float16, the longest in the last shard."""
    return (np.random.default_rng(i).standard_normal((1 + (i % 3 if i != 30 else 3), WIDTH))).astype(np.float16)


def write_texts(folder: Path, text=text_of, sizes=SIZES, **settings) -> Path:
    """As made_sets.write_set; sample i has text(i) and not a label."""
    folder.mkdir(parents=True)
    start = 0
    for shard, size in enumerate(sizes):
        write_shard(
            folder / shard_name("train", shard),
            [(f"{i:04d}", array_of(i), text(i)) for i in range(start, start + size)],
        )
        start += size
    finalize(folder, LatentEncoding("sample_scaled"), **settings)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "set")


def check_texts(text: Text, numbers: list[int], length: int = 4) -> None:
    assert text.states.shape == (len(numbers), length, WIDTH) and text.mask.shape == (len(numbers), length)
    assert (text.states.dtype, text.mask.dtype) == (torch.float16, torch.bool)
    for i, states, mask in zip(numbers, *text):
        n = len(text_of(i))
        assert mask.tolist() == [True] * n + [False] * (length - n) and not states[n:].any()
        np.testing.assert_array_equal(states[:n].numpy(), text_of(i))


def test_texts_are_read_and_padded(folder):
    latents = open_latents(folder, condition="text")
    chosen = [30, 0, 1, 2, 30, 11]
    raw, text = latents.read(chosen)
    assert numbers_in(raw) == chosen
    check_texts(text, chosen)
    assert (latents.text_length, latents.text_width, latents.labels, latents.num_classes) == (4, WIDTH, None, None)
    manifest = json.loads((folder / "meta.json").read_text())
    known = {key: manifest[key] for key in ("condition", "text_width", "text_dtype", "text_length", "num_classes")}
    assert known == {
        "condition": "text", "text_width": WIDTH, "text_dtype": "float16", "text_length": 4, "num_classes": None,
    }  # fmt: skip
    few = latents.conditions(4)
    check_texts(few, [0, 10, 20, 31])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_is_that_of_class_sets(folder, tmp_path, num_workers):
    classes = open_latents(write_set(tmp_path / "classes", SIZES))
    texts, alone = (open_latents(folder, condition=condition) for condition in ("text", "none"))
    settings = dict(num_steps=2 * TOTAL // 8, num_workers=num_workers, seed=5, pin_memory=False)
    streams = [make_loader(latents, BatchPlan(8, 4, 2, 0, 1), **settings) for latents in (classes, texts, alone)]
    count = 0
    for (a, y), (b, text), (c, nothing) in zip(*streams, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and nothing is None and y.dtype == torch.int64
        check_texts(text, numbers_in(b))
        count += 1
    assert count == 2 * (2 * TOTAL // 8)


def test_latents_alone(tmp_path):
    folder = write_texts(tmp_path / "set", text=lambda i: None)
    latents = open_latents(folder, condition="none")
    raw, condition = latents.read([3, 20])
    assert numbers_in(raw) == [3, 20] and condition is None and latents.conditions(3) is None
    assert read_manifest(folder)["condition"] == inspect(folder)["condition"] == "none"
    for wanted in ("class", "text"):
        with pytest.raises(
            UserError, match="holds no condition beside its latents, not .*; needed: data.condition=none"
        ):
            open_latents(folder, condition=wanted)


def test_another_condition_is_refused(folder, tmp_path):
    with pytest.raises(
        UserError, match="holds texts beside its latents, not class labels; needed: data.condition=text"
    ):
        open_latents(folder)
    classes = write_set(tmp_path / "classes", (3,))
    with pytest.raises(
        UserError, match="holds class labels beside .*, not texts; needed: data.condition=class, or none"
    ):
        open_latents(classes, condition="text")
    assert open_latents(classes, condition="none").read([1])[1] is None
    for name in ("meta.json", *(path.name for path in classes.glob(".*.npz"))):
        (classes / name).unlink()
    with pytest.raises(UserError, match="holds class labels beside"):  # bare shards say it too
        open_latents(classes, condition="text")
    with pytest.raises(UserError, match="holds texts; needed: num_classes=null, not 3"):
        write_texts(tmp_path / "counted", num_classes=3)


def test_a_manifest_that_does_not_say_is_of_classes(tmp_path):
    folder = write_set(tmp_path / "set", (3,))
    manifest = json.loads((folder / "meta.json").read_text())
    before = open_latents(folder).fingerprint
    for key in ("condition", "text_width", "text_dtype", "text_length"):
        del manifest[key]
    (folder / "meta.json").write_text(json.dumps(manifest))
    latents = open_latents(folder)
    assert latents.read([2])[1].tolist() == [2] and latents.fingerprint == before
    assert before == "815f375c5f0d6cad"  # checkpoints have it: it may never change


def test_bare_shards_and_the_commands(folder, tmp_path, capsys):
    bare = tmp_path / "a bare set"
    bare.mkdir()
    for shard in folder.glob("*.tar"):
        (bare / shard.name).write_bytes(shard.read_bytes())
    check_texts(open_latents(bare, condition="text").read([2, 30])[1], [2, 30])
    assert data.__main__.main(["index", str(bare)]) == 0
    assert "32 train entries of sample_scaled (4, 4, 4), with texts, sound" in capsys.readouterr().out
    assert read_manifest(bare) == read_manifest(folder)
    assert data.__main__.main(["inspect", str(bare)]) == 0
    said = capsys.readouterr().out
    assert "condition texts of up to 4 tokens of width 6" in said
    settings = "data.channels=4 data.input_size=4 data.condition=text data.num_classes=null"
    assert f"data.path={bare}' {settings} data.text_width=6 data.text_length=4\n" in said


def test_index_is_built_once_and_fingerprint_knows_every_text(tmp_path, monkeypatch):
    def changed(i: int) -> np.ndarray:
        return text_of(i) if i != 9 else text_of(i) * 2

    def longer(i: int) -> np.ndarray:
        return text_of(i) if i != 9 else np.concatenate([text_of(i), text_of(i)])

    sets = [write_texts(tmp_path / name, text) for name, text in (("a", text_of), ("b", changed), ("c", longer))]
    monkeypatch.setattr(data.index, "read_samples", None)  # not called
    prints = [open_latents(folder, condition="text").fingerprint for folder in (*sets, sets[0])]
    assert len(set(prints)) == 3 and prints[0] == prints[3]


def sample(text: bytes) -> list[tuple]:
    return [("0001.latent.npy", npy(array_of(1))), ("0001.text.npy", text)]


NAN = np.full((2, WIDTH), np.nan, np.float16)
BAD_TEXTS = {
    "nan": (sample(npy(NAN)), "has a .text.npy that has numbers that are not finite"),
    "no token": (sample(npy(NAN[:0])), r"that is float16 \(0, 6\); needed: float16 \(1..4, 6\)"),
    "width": (sample(npy(NAN[:, :5])), r"that is float16 \(2, 5\)"),
    "too long": (sample(npy(np.zeros((5, WIDTH), np.float16))), r"that is float16 \(5, 6\)"),
    "dtype": (sample(npy(NAN.astype(np.float32))), "that is float32"),
    "one vector": (sample(npy(NAN[0])), r"that is float16 \(6,\)"),
    "short": (sample(npy(text_of(1))[:-2]), "that has 22 bytes of numbers"),
    "no array": (sample(b"a cat"), "that is not a .npy array"),
    "pickle": (sample(npy(np.array([{}], dtype=object), allow_pickle=True)), "pickled objects, which are never read"),
    "no text": (sample(b"")[:1], "has no .text.npy"),
}


@pytest.mark.parametrize("defect", BAD_TEXTS)
def test_bad_text_is_named(tmp_path, defect, capfd):
    folder, (members, said) = write_texts(tmp_path / "set"), BAD_TEXTS[defect]
    first = [("0000.latent.npy", npy(array_of(0))), ("0000.text.npy", npy(text_of(0)))]
    write_members(folder / "train-000000.tar", [*first, *members])
    with pytest.raises(
        UserError, match=rf"train-000000.tar: sample '0001' at byte \d+ {'' if said[0] == 'h' else '.*'}{said}"
    ):
        open_latents(folder, condition="text")
    latents = open_latents(folder, condition="text", on_error="skip")
    assert len(latents) == TOTAL - 4 and latents.faults[0] in capfd.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_text_that_turns_bad_is_skipped_or_stops(tmp_path, num_workers):
    folder = write_texts(tmp_path / "set")
    stopping, skipping, alone = (
        open_latents(folder, condition=condition, on_error=on_error)
        for condition, on_error in (("text", "stop"), ("text", "skip"), ("none", "stop"))
    )
    shard = folder / "train-000002.tar"
    member = tarfile.open(shard).getmember("0030.text.npy")  # the longest: what was read of it must not stay
    flip_bit(shard, member.offset_data + 130, keep_time=True)
    raw, text = skipping.read([29, 30, 5])
    assert numbers_in(raw) == [29, 31, 5] and len(skipping.faults) == 1
    check_texts(text, [29, 31, 5])
    plan, settings = BatchPlan(8, 8, 1, 0, 1), dict(num_steps=TOTAL // 8, num_workers=num_workers)
    assert sorted(n for raw, _ in make_loader(skipping, plan, **settings) for n in numbers_in(raw)) == sorted(
        31 if i == 30 else i for i in range(TOTAL)
    )
    with pytest.raises(UserError, match="train-000002.tar: sample '0030' at byte .* has changed") as error:
        list(make_loader(stopping, plan, **settings))
    assert "\n" not in str(error.value)
    assert len(list(make_loader(alone, plan, **settings))) == 4  # texts are not read
    assert inspect(folder)["wrong"] == [skipping.faults[0].replace(" since it was indexed", "")]


def test_latents_need_not_be_square(tmp_path):
    folder = tmp_path / "wide"
    folder.mkdir()
    arrays = np.random.default_rng(0).standard_normal((9, 4, 8, 16)).astype(np.float16)
    write_shard(folder / "train-0.tar", [(f"{i}", array, i % 3) for i, array in enumerate(arrays)])
    finalize(folder, LatentEncoding("moments_logvar", 0.5))
    latents = open_latents(folder)
    raw, y = latents.read([0, 4])
    assert latents.shape == (2, 8, 16) and latents.to_model_input(raw).shape == (2, 2, 8, 16) and y.tolist() == [0, 1]
    np.testing.assert_array_equal(raw.numpy(), arrays[[0, 4]])
    words = inspect(folder)["next"]
    assert "'data.input_size=[8,16]'" in words and "data.input_size=[8,16]" in shlex.split(words)


def test_lengths_that_a_manifest_claims_are_not_trusted(folder, tmp_path):
    shutil.copytree(folder, other := tmp_path / "set")
    about = read_manifest(folder)
    (other / "meta.json").write_text(json.dumps(about | {"text_length": 4.0, "text_width": float(WIDTH)}))
    check_texts(open_latents(other, condition="text").read([0, 3])[1], [0, 3])
    (other / "meta.json").write_text(json.dumps(about | {"text_length": 2**40}))
    with pytest.raises(UserError, match=r"text_length=1099511627776; needed: a whole number in \[1, 8193\)"):
        open_latents(other, condition="text")


def no_texts(index: dict) -> None:
    index["entries"]["length"] = 0


def no_such_shape(index: dict) -> None:
    about = json.loads(index["about"].tobytes())
    about["layout"] |= {"shape": [2**40, 4, 4]}
    index["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)


def deep(index: dict) -> None:
    index["about"] = np.frombuffer(b"[" * 100_000, np.uint8)


@pytest.mark.parametrize("change", [no_texts, no_such_shape, deep, None])
def test_an_index_that_cannot_be_is_made_anew(folder, tmp_path, change):
    shutil.copytree(folder, other := tmp_path / "set")
    (other / "meta.json").unlink()
    open_latents(other, condition="text")
    path = next(other.glob(".*.index.npz"))
    with np.load(path) as arrays:
        index = {name: arrays[name] for name in arrays}
    path.unlink()
    if change is None:
        os.mkfifo(path)
    else:
        change(index)
        np.savez(path, **index)
    check_texts(open_latents(other, condition="text").read([0, 3])[1], [0, 3])
