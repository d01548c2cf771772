"""IDX files become shards, and Fashion-MNIST has scores of its own."""

import gzip
import json

import numpy as np
import pytest
from accelerate import PartialState

import data
import data.prepared
import fid
from checkpoints.config import Settings
from data import BatchPlan, open_latents, prepare
from data.packed import find_idx, read_idx
from data.prepared import prepare_fashion
from evaluation import features
from evaluation.reference import MAX_FEATURES, shipped_reference
from system import UserError, cli
from system.settings import parse
from tests.conftest import ROOT
from tests.made_sets import idx, write_idx
from training.prepare import open_data

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize("compress", [True, False])
def test_shards_hold_the_pictures_and_the_test_split_is_val(tmp_path, compress):
    sets = write_idx(tmp_path / "files", compress=compress)
    prepare("idx", tmp_path / "made", tmp_path / "files")
    for split, first, (images, labels) in zip(("train", "val"), (0, 30), sets):
        latents = open_latents(tmp_path / "made", split=split)
        assert (latents.shape, latents.kind, latents.num_classes) == ((1, 28, 28), "sample_scaled", 10)
        raw, y = latents.read(range(len(latents)))
        numbers = [int(key) - first for key in latents.keys(range(len(latents)))]
        assert sorted(numbers) == list(range(len(images))) and numbers != sorted(numbers)
        np.testing.assert_array_equal(((raw[:, 0].float() + 1) * 127.5).round().numpy(), images[numbers])
        np.testing.assert_array_equal(y, labels[numbers])


def test_pictures_need_not_be_square(tmp_path):
    (tmp_path / "files").mkdir()
    images, labels = np.random.default_rng(0).integers(0, 256, (9, 20, 28), np.uint8), np.arange(9, dtype=np.uint8)
    for split in ("train", "t10k"):
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            (tmp_path / "files" / f"{split}-{what}-ubyte").write_bytes(idx(array))
    with pytest.raises(UserError, match="pictures of 20x28 pixels; data.input_size says 28x20"):
        prepare("idx", tmp_path / "made", tmp_path / "files", [28, 20])
    prepare("idx", tmp_path / "made", tmp_path / "files", [20, 28])
    assert open_latents(tmp_path / "made").shape == (1, 20, 28)


def test_made_shards_are_made_again_only_when_damaged(tmp_path, capsys):
    write_idx(tmp_path / "files")
    keys = ["data=idx", f"data.source={tmp_path}/files", f"data.path={tmp_path}/made"]
    asked = parse(Settings, cli.load_config("config", keys)), PartialState(cpu=True), BatchPlan(64, 64, 1, 0, 1)
    open_data(*asked)
    assert capsys.readouterr().out.count("made does not exist: data.source's pictures are made there") == 1
    shard = tmp_path / "made/val-000000.tar"
    before = shard.read_bytes(), shard.stat().st_mtime_ns
    loaded = open_data(*asked)
    assert (len(loaded.train), len(loaded.val)) == (30, 20) and not capsys.readouterr().out
    assert before == (shard.read_bytes(), shard.stat().st_mtime_ns)
    shard.write_bytes(before[0][:5000])
    open_data(*asked)
    assert shard.read_bytes() == before[0]


def test_several_sets_in_one_folder_are_told_apart(tmp_path):
    for name in ("emnist-balanced-", "emnist-letters-"):
        write_idx(tmp_path, name=name, test="test")
    with pytest.raises(UserError, match="of emnist-balanced, emnist-letters; needed: one"):
        find_idx(tmp_path)
    pairs = find_idx(tmp_path / "emnist-letters")
    assert [pair.labels.name for pair in pairs.values()] == [
        "emnist-letters-train-labels-idx1-ubyte.gz", "emnist-letters-test-labels-idx1-ubyte.gz",
    ]  # fmt: skip
    write_idx(tmp_path, name="emnist-letters-", test="test", compress=False)  # torchvision keeps both
    assert find_idx(tmp_path / "emnist-letters")["test"].images.name == "emnist-letters-test-images-idx3-ubyte"


def test_other_shards_are_refused(tmp_path):
    for name in ("one", "two"):
        write_idx(tmp_path / name, name="" if name == "one" else "x-")
    prepare("idx", tmp_path / "made", tmp_path / "one")
    with pytest.raises(UserError, match="made was begun with train images="):
        prepare("idx", tmp_path / "made", tmp_path / "two")


def zipped(array: np.ndarray) -> bytes:
    return gzip.compress(idx(array))


# What is wrong: (the file, its contents made of those it had; None = it is not there), and what is said.
BAD = {
    "no labels": (TRAIN_LABELS, lambda _: None, f"has {TRAIN_IMAGES} alone; needed: images and labels"),
    "magic": (
        TRAIN_LABELS, lambda _: zipped(np.zeros((30, 28, 28), np.uint8)),
        f"{TRAIN_LABELS} begins with 00 00 08 03; needed: 00 00 08 01",
    ),
    "truncated gz": (TRAIN_IMAGES, lambda whole: whole[:9000], f"{TRAIN_IMAGES} is cut off"),
    "no gz": (TRAIN_IMAGES, lambda _: b"<html>", f"{TRAIN_IMAGES} is cut off or damaged (Not a gzip"),
    "flipped bits": (TRAIN_IMAGES, lambda whole: whole[:-8] + bytes(8), "is cut off or damaged"),
    "short": (
        TRAIN_IMAGES, lambda _: gzip.compress(idx(np.zeros((30, 28, 28), np.uint8))[:-1]),
        "has 23519 bytes of numbers; its header needs 23520",
    ),
    "empty": (TRAIN_LABELS, lambda _: gzip.compress(b"\0\0\x08\x01"), "has 0 bytes of numbers"),
    "counts": (TRAIN_LABELS, lambda _: zipped(np.zeros(29, np.uint8)), "has 30 images, train-labels"),
    "labels": (
        TRAIN_LABELS, lambda _: zipped(np.full(30, 26, np.uint8)),
        "has labels up to 26; needed: below data.num_classes=10",
    ),
    "size": (
        TRAIN_IMAGES, lambda _: zipped(np.zeros((30, 32, 30), np.uint8)),
        "has pictures of 32x30 pixels; data.input_size says 28x28",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_line_and_leave_nothing(case, tmp_path, capsys):
    write_idx(tmp_path / "files")
    name, damage, said = BAD[case]
    file = tmp_path / "files" / name
    contents = damage(file.read_bytes())
    file.write_bytes(contents) if contents is not None else file.unlink()
    cfg = cli.load_config("config", ["data=idx", f"data.source={tmp_path}/files", f"data.path={tmp_path}/made"])
    with pytest.raises(SystemExit) as refused, cli.user_errors():
        open_data(parse(Settings, cfg), PartialState(cpu=True), BatchPlan(64, 64, 1, 0, 1))
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1 and said in error, error
    assert not (tmp_path / "made").exists()


def test_missing_files_get_one_line(tmp_path):
    with pytest.raises(UserError, match="none has no IDX files; needed: train-images-idx3-ubyte"):
        prepare("idx", tmp_path / "made", tmp_path / "none")
    write_idx(tmp_path / "files")
    for path in (tmp_path / "files").glob("t10k*"):
        path.unlink()
    with pytest.raises(UserError, match="of its train split alone; needed: train and test"):
        prepare("idx", tmp_path / "made", tmp_path / "files")
    assert not (tmp_path / "made").exists()


def test_fashion_is_found_where_debian_and_torchvision_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepared, "FASHION_FOLDERS", [tmp_path / "debian", tmp_path / "FashionMNIST/raw"])
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist, or data.source="):
        prepare_fashion(tmp_path / "made")
    write_idx(tmp_path / "FashionMNIST/raw")
    prepare_fashion(tmp_path / "made")
    assert len(open_latents(tmp_path / "made")) == 30
    (tmp_path / "FashionMNIST").rename(tmp_path / "gone")
    prepare_fashion(tmp_path / "made")  # made already: the files are not needed
    with pytest.raises(UserError, match="no IDX files"):
        prepare_fashion(tmp_path / "made", tmp_path / "FashionMNIST/raw")
    assert json.loads((tmp_path / "made/meta.json").read_text())["counts"] == {"train": 30, "val": 20}


def test_scores_of_fashion(tmp_path, capsys):
    sets = write_idx(tmp_path / "files", sizes=(300, 100))
    prepare_fashion(tmp_path / "made", tmp_path / "files")
    for name, images in (("same", sets[0][0]), ("others", 255 - sets[1][0] // 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        where = [f"images={tmp_path / name}.npz", f"out={tmp_path / name}", f"fashion={tmp_path / 'made'}"]
        fid.main(["calc", "extractor=fashion", *where])
    same, others = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("same", "others"))
    assert same["fd_fashion"] < 1e-3 < others["fd_fashion"] and same["precision"] == 1
    assert (same["extractor"], same["reference_n"]) == ("fashion", 300)


def test_the_reference_is_kept_and_made_again_when_damaged(tmp_path, monkeypatch):
    write_idx(tmp_path / "files", sizes=(300, 100))
    prepare_fashion(tmp_path / "made", tmp_path / "files")
    extractor, found = features.load_extractor("fashion"), []
    for _ in range(3):
        found.append(shipped_reference(extractor, tmp_path / "made"))
        (kept,) = (tmp_path / "made").glob(".training-*.npz")
        if len(found) == 2:
            kept.write_bytes(kept.read_bytes()[:100])
    assert found[0].n == len(found[0].features) == 300 <= MAX_FEATURES
    for other in found[1:]:
        assert (other.n, other.source, other.sha256) == (found[0].n, found[0].source, None)
        for key in ("mu", "sigma", "features"):
            np.testing.assert_array_equal(getattr(other, key), getattr(found[0], key))


def test_the_fashion_classifier_is_small_and_of_the_digits_shape():
    assert features.CLASSIFIERS["fashion"].stat().st_size < 1_000_000
    card = (ROOT / "assets" / "README.md").read_text()
    assert features.load_extractor("fashion").sha256 in card and features.load_extractor("mnist").sha256 in card


@pytest.mark.skipif(not data.prepared.FASHION_FOLDERS[0].is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_fashion_classifier_reads_clothes_it_has_not_seen():
    images, labels = read_idx(find_idx(data.prepared.FASHION_FOLDERS[0])["test"])
    extractor, right = features.load_extractor("fashion"), 0
    images = features.torch.from_numpy(images.copy())[:, None].expand(-1, 3, -1, -1)
    for part, wanted in zip(images.split(500), np.split(labels, 20)):
        right += (extractor(part).logits.argmax(1).numpy() == wanted).sum()
    assert len(images) == 10_000 and right / 10_000 >= 0.92
