"""Sizes are checked before memory is taken, nothing starts a program or hangs: pictures, archives, pickles, arrays."""

import gzip
import io
import os
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data.archives
import data.foreign.pickled
import data.images
from checkpoints.gallery import read_images
from data.archives import open_tree, read_arrays, read_npy
from data.foreign import open_source
from data.foreign.pickled import read_pickled_array
from data.images import open_images
from data.packed import IdxPair, read_idx
from system import UserError, limits
from system.files import read_json
from system.tensors import read_pt

PNG = io.BytesIO()
Image.new("RGB", (4, 4)).save(PNG, "png")
PNG = PNG.getvalue()


def bomb_png(path):
    Image.new("L", (12_000, 12_000)).save(path / "a.png", compress_level=1)
    return lambda: open_images(path).read(0)


def bomb_sample(path):
    (path / "images" / "000000").mkdir(parents=True)
    Image.new("L", (12_000, 12_000)).save(path / "images" / "000000" / "000000.png", compress_level=1)
    return lambda: list(read_images(path, [0]))


def postscript(path):
    (path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n%%EOF\n")
    return lambda: open_images(path).read(0)


def pipe(path):
    os.mkfifo(path / "a.png")
    return lambda: open_images(path).read(0)


def device(path):
    (path / "a.png").symlink_to("/dev/zero")
    return lambda: open_images(path).read(0)


def encrypted(path):
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        archive.writestr("0.png", PNG)
    contents = bytearray((path / "a.zip").read_bytes())
    at = contents.index(b"PK\x01\x02")
    contents[6] = contents[at + 8] = 1
    (path / "a.zip").write_bytes(contents)
    return lambda: open_images(path / "a.zip").read(0)


def deflate64(path):
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        archive.writestr("0.png", PNG)
    contents = bytearray((path / "a.zip").read_bytes())
    at = contents.index(b"PK\x01\x02")
    contents[8] = contents[at + 10] = 9
    (path / "a.zip").write_bytes(contents)
    return lambda: open_images(path / "a.zip").read(0)


def no_directory(path):
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        archive.writestr("0.png", PNG)
    contents = (path / "a.zip").read_bytes()
    (path / "a.zip").write_bytes(contents.replace(b"PK\x01\x02", b"XXXX"))
    return lambda: open_tree(path / "a.zip")


def npz(path, shape, numbers=b""):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", header.getvalue() + numbers)
    return lambda: read_arrays(path / "a.npz", ["mu"])


def gz(path):
    for name, head in (
        ("images-idx3", struct.pack(">2xBB3I", 8, 3, 1, 28, 28)),
        ("labels-idx1", b"\0\0\x08\1\0\0\0\1"),
    ):
        with gzip.open(path / f"train-{name}-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(head)
            for _ in range(64):
                file.write(bytes(1 << 20))
    names = (f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    return lambda: read_idx(IdxPair(*(path / name for name in names)))


def packed_weights(path):
    torch.save({"a": torch.zeros(1 << 20)}, path / "plain.pt")
    with zipfile.ZipFile(path / "plain.pt") as plain, zipfile.ZipFile(path / "a.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    return lambda: read_pt(path / "a.pt")


def long_text(path):
    with open(path / "a.json", "wb") as file:
        file.truncate(limits.TEXT_BYTES + 1)
    return lambda: read_json(path / "a.json")


def deep_text(path):
    (path / "a.json").write_text("[" * 100_000)
    return lambda: read_json(path / "a.json")


def garbage_lmdb(path):
    (path / "data.mdb").write_bytes(b"hello" * 2000)
    return lambda: open_source(path)


def pickled(contents):
    return lambda path: lambda: read_pickled_array(contents, "a.latent")


BOMBS = {
    "png": (bomb_png, str(limits.PICTURE_PIXELS)),
    "png among samples": (bomb_sample, str(limits.PICTURE_PIXELS)),
    "postscript": (postscript, "no image"),
    "pipe": (pipe, "needed: a file"),
    "device": (device, "needed: a file"),
    "encrypted zip": (encrypted, "encrypted"),
    "deflate64": (deflate64, "not supported"),
    "zip without a directory": (no_directory, "is damaged"),
    "npz that lies": (lambda path: npz(path, (10**15,)), "not those of"),
    "npz of odd sizes": (lambda path: npz(path, (3,), bytes(8)), "not those of"),
    "gzip": (gz, "bytes of numbers"),
    "compressed weights": (packed_weights, "is compressed"),
    "long text": (long_text, str(limits.TEXT_BYTES)),
    "deep text": (deep_text, "is damaged"),
    "lmdb": (garbage_lmdb, "cannot be opened"),
    "pickle's memo": (pickled(b"\x80\x02Nr\xff\xff\xff\x7f."), str(limits.PICKLE_STEPS)),
    "pickle's memo as text": (pickled(b"Np99999999\n."), str(limits.PICKLE_STEPS)),
    "pickle's length": (pickled(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"."), "not a pickled array"),
    "pickle's steps": (pickled(b"\x80\x02" + b"N0" * 10**6 + b"."), str(limits.PICKLE_STEPS)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_one_line(bomb, tmp_path):
    make, named = BOMBS[bomb]
    read = make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refused:
        read()
    assert named in str(refused.value) and "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_an_error_of_our_own_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    images = open_images(tmp_path)
    monkeypatch.setattr(data.images.np, "asarray", lambda *_: 1 + "a bug")
    with pytest.raises(TypeError, match="unsupported operand"):
        list(images.batches(1, range(1)))


@pytest.mark.parametrize("module", [data.archives, data.foreign.pickled])
def test_an_error_of_our_own_in_reading_arrays_keeps_its_traceback(module, monkeypatch):
    array, npy = np.zeros((4, 2, 2), np.float32), io.BytesIO()
    np.save(npy, array)
    read, contents = (
        (read_npy, npy.getvalue()) if module is data.archives else (read_pickled_array, pickle.dumps(array))
    )
    np.testing.assert_array_equal(read(contents, "a"), array)
    monkeypatch.setattr(module, "fits", lambda *_: 1 + "a bug")
    with pytest.raises(TypeError, match="unsupported operand"):
        read(contents, "a")
