"""Parquet files, several tars and IDX files encode as the same pictures in folders do."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scripts.encode_latents
from data.images import open_images
from data.packed import open_pictures
from scripts.encode_latents import main
from system import UserError, cli
from tests.made_sets import add, write_idx
from tests.test_encode import settings, vae  # noqa: F401  a fixture

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def jpeg(number: int) -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(number)
    height, width = rng.integers(33, 80, 2)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path: Path, pictures: list[bytes], labels: list, group: int = 7) -> None:
    """As the package datasets writes them: a struct of bytes and path, and small row groups."""
    rows = [{"bytes": contents, "path": f"{i}.JPEG"} for i, contents in enumerate(pictures)]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": rows, "label": labels}), path, row_group_size=group)


def write_everywhere(root: Path, count: int, classes: int = 4) -> list[Path]:
    """The same pictures in class folders, in two parquet files and in two tars -> their paths."""
    pictures = [jpeg(i) for i in range(count)]
    labels = [i * classes // count for i in range(count)]
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        file = root / "folders" / f"class{label}" / f"{i:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
    (root / "tars").mkdir()
    for number, half in enumerate((slice(0, count // 3), slice(count // 3, None))):
        write_parquet(root / f"rows/data/train-{number:05d}-of-00002.parquet", pictures[half], labels[half])
        with tarfile.open(root / f"tars/imagenet.train-{number:04d}.tar", "w") as tar:
            for i in range(count)[half]:
                add(tar, f"{i:06d}.jpg", pictures[i])
                add(tar, f"{i:06d}.cls", b"%d" % labels[i])
    return [root / "folders", root / "rows", root / "tars"]


def test_latents_are_the_same_byte_for_byte(tmp_path, vae):  # noqa: F811
    folders, *others = write_everywhere(tmp_path, 60)
    for source in (folders, *others):
        main(settings(source, tmp_path / "out" / source.name, vae, "val=5", "shard_size=20", "flip=both"))
    files = sorted((tmp_path / "out/folders").glob("*.tar"))
    assert len(files) == 4
    said = json.loads((tmp_path / "out/folders/meta.json").read_text())
    assert len(said.pop("classes")) == 4  # which folders alone have
    for source in others:
        out = tmp_path / "out" / source.name
        assert json.loads((out / "meta.json").read_text()) == said, source
        for file in files:
            assert (out / file.name).read_bytes() == file.read_bytes(), source


def test_an_interrupted_call_goes_on_to_the_same_bytes(tmp_path, vae, monkeypatch):  # noqa: F811
    _, rows, _ = write_everywhere(tmp_path, 40)
    main(settings(rows, tmp_path / "whole", vae))
    written = scripts.encode_latents.write_shard

    def write_two(path, samples):
        if len(list(path.parent.glob("*.tar"))) == 2:
            next(samples)
            raise KeyboardInterrupt
        written(path, samples)

    monkeypatch.setattr(scripts.encode_latents, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        main(settings(rows, tmp_path / "cut", vae))
    monkeypatch.undo()
    main(settings(rows, tmp_path / "cut", vae))
    for file in (tmp_path / "whole").glob("[!.]*"):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()


def test_a_split_is_chosen_by_the_names_of_files(tmp_path):
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", [jpeg(i) for i in range(count)], [0] * count)
    assert [len(open_images(tmp_path, split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert len(open_images(tmp_path / "data/test-00000-of-00001.parquet")) == 1
    with pytest.raises(UserError, match="has files of split=test, train, val; needed: one of them$"):
        open_images(tmp_path)
    with pytest.raises(UserError, match="needed: one of them, not all"):
        open_images(tmp_path, "all")
    (tmp_path / "one/a").mkdir(parents=True)
    (tmp_path / "one/a/0.jpg").write_bytes(jpeg(0))
    with pytest.raises(UserError, match="has no files of several splits; needed: split=null"):
        open_images(tmp_path / "one", "train")


def test_idx_files_are_pictures(tmp_path, vae):  # noqa: F811
    (images, labels), _ = write_idx(tmp_path / "files", name="emnist-letters-", test="test")
    for source in (tmp_path / "files", tmp_path / "files/emnist-letters"):
        found = open_images(source, "train")
        assert found.labels == labels.tolist()
        np.testing.assert_array_equal(np.asarray(found.read(7)), np.repeat(images[7][..., None], 3, 2))
    with pytest.raises(UserError, match="split=test, train"):
        open_images(tmp_path / "files")
    main(settings(tmp_path / "files", tmp_path / "out", vae, "split=test"))
    with pytest.raises(UserError, match="was not there when .* was begun"):
        main(settings(tmp_path / "files", tmp_path / "out", vae, "split=train"))


def test_tars_need_labels(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add(tar, "0.jpg", jpeg(0))
    with pytest.raises(UserError, match="train-0.tar has no labels; needed: <key>.cls beside each picture"):
        open_images(tmp_path)


def test_rows_are_read_by_group_and_not_one_by_one(tmp_path, monkeypatch):
    pictures = [jpeg(i) for i in range(50)]
    write_parquet(tmp_path / "train.parquet", pictures, [0] * 50, group=10)
    reads, read = [], parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *a, **k: reads.extend(k["row_groups"]) or read(*a, **k)
    )
    tree = open_pictures(tmp_path / "train.parquet")
    names = [name for name in tree.names if name.endswith("jpg")]
    mixed = [names[i] for i in np.random.default_rng(0).permutation(50)[:25]]
    tree.fetch(mixed)
    assert [tree.read(name) for name in mixed] == [pictures[names.index(name)] for name in mixed]
    assert reads == [0, 1, 2, 3, 4]


def test_alpha_and_cmyk_and_palettes_become_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(np.dstack([rgb, np.full((40, 30), 9, np.uint8)])).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (200, 30, 60)).convert("CMYK").save(tmp_path / "b.jpg", quality=100)
    Image.new("RGB", (30, 40), (200, 30, 60)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "c.png")
    images = open_images(tmp_path)
    np.testing.assert_array_equal(np.asarray(images.read(0)), rgb)
    for i in (1, 2):
        assert images.read(i).mode == "RGB"
        np.testing.assert_allclose(np.asarray(images.read(i)).reshape(-1, 3), [[200, 30, 60]] * 1200, atol=3)


def table(**columns) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def struct(contents: bytes | None) -> pa.Array:
    return pa.array([{"bytes": contents, "path": "a"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))


BAD = {
    "no label column": (
        lambda: table(image=struct(jpeg(0)), caption=["a cat"]),
        "has the columns image .*, caption .string.; needed: .* whole numbers named label",
    ),
    "no image column": (lambda: table(label=[1]), "has the columns label .int64.; needed: one of image bytes"),
    "two label columns": (lambda: table(image=struct(jpeg(0)), fine=[1], coarse=[0]), "fine .*, coarse .*; needed"),
    "no parquet": (lambda: b"<html>" * 9, "is damaged or no parquet file"),
    "cut off": (lambda: table(image=struct(jpeg(0)), label=[0])[:-30], "is damaged or no parquet file"),
    "no bytes": (lambda: table(image=struct(None), label=[0]), "row 0 has no picture in it"),
    "no label": (lambda: table(image=struct(jpeg(0)), label=[-1]), "says '-1'; needed: a whole number, 0.."),
    "no picture": (lambda: table(image=struct(b"text"), label=[1]), "00000000.jpg is no image or is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parquet_gets_one_line(case, tmp_path, capsys):
    contents, said = BAD[case]
    (tmp_path / "train.parquet").write_bytes(contents())
    with pytest.raises(SystemExit) as refused, cli.user_errors():
        main([f"images={tmp_path}", f"out={tmp_path}/out", f"vae={tmp_path}"])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1, error
    with pytest.raises(UserError, match=said):
        images = open_images(tmp_path)
        assert images.labels and images.read(0)


def test_a_name_that_is_not_cached_gets_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused, cli.user_errors():
        main(["images=hf:nobody/pictures", f"out={tmp_path}/out", f"vae={tmp_path}"])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: hf:nobody/pictures is not cached, and the hub did not send it")


def test_pyarrow_is_asked_for(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [jpeg(0)], [0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="train.parquet needs the package pyarrow: pip install pyarrow"):
        open_images(tmp_path)
