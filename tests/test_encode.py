"""Photographs into latents by the command, with a small AutoencoderKL, whatever interrupts it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.__main__
from data.archives import Tree
from data.images import Images, center_crop, open_images
from data.shards import open_latents, write_shard
from scripts.encode_latents import main, wait_for_shards
from system import UserError, cli
from tests import started
from tests.conftest import TORCHRUN

ROOT = Path(__file__).resolve().parent.parent
SIZE, SCALE = 32, 0.5
NUM_PHOTOS = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Crops of two photographs, china/ and flower/, as JPEG; and, in plain/, pictures of one colour."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images):
        (root / name).mkdir()
        for i in range(NUM_PHOTOS // 2):
            height, width = rng.integers(SIZE, 200, 2)
            top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
            Image.fromarray(photo[top : top + height, left : left + width]).save(root / name / f"{i}.jpg")
    (root / "plain").mkdir()
    for grey in (0, 255):
        Image.new("RGB", (50, 40), (grey, grey, grey)).save(root / "plain" / f"{grey}.png")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8] * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIZE,
    ).save_pretrained(path)  # fmt: skip
    return path


def settings(photos: Path, out: Path, vae: Path, *more: str) -> list[str]:
    common = [
        f"images={photos}",
        f"out={out}",
        f"vae={vae}",
        f"scale={SCALE}",
        f"size={SIZE}",
        "batch_size=4",
        "shard_size=6",
    ]
    return [*common, *more]


def command(*arguments, launcher: tuple = ()) -> list[str]:
    return [sys.executable, *launcher, str(ROOT / "scripts/encode_latents.py"), *settings(*arguments)]


@pytest.fixture(scope="module")
def encoded(photos, vae, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "set"
    main(settings(photos, out, vae, "kind=moments", "flip=both", "dtype=float32", "val=3"))
    return out


def encoder_moments(vae: Path, pixels: np.ndarray) -> torch.Tensor:
    """(2C, h, w) of one picture (3, H, W) uint8, straight from diffusers."""
    from diffusers import AutoencoderKL

    with torch.no_grad():
        x = torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1
        posterior = AutoencoderKL.from_pretrained(vae).encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)[0]


def read_all(folder: Path, split: str) -> dict[str, tuple[torch.Tensor, int]]:
    latents = open_latents(folder, split=split)
    raw, y = latents.read(range(len(latents)))
    return dict(zip(latents.keys(range(len(latents))), zip(raw, y.tolist())))


def test_every_picture_and_its_mirror_image_is_the_vaes(photos, vae, encoded):
    images = open_images(photos)
    assert images.classes == ["china", "flower", "plain"] and len(images.names) == NUM_PHOTOS + 2
    train, val = read_all(encoded, "train"), read_all(encoded, "val")
    assert (len(train), len(val)) == (2 * (NUM_PHOTOS - 1), 6) and not train.keys() & val.keys()
    stored = train | val
    for i in (0, 1, NUM_PHOTOS - 1):
        pixels = center_crop(images.read(i), SIZE)
        for key, picture in ((f"{i:08d}", pixels), (f"{i:08d}-flip", pixels[..., ::-1])):
            array, label = stored[key]
            torch.testing.assert_close(array, encoder_moments(vae, picture), rtol=1e-4, atol=1e-4)
            assert label == images.labels[i]


def test_constant_picture_has_the_known_latent(photos, vae, encoded):
    """White and black: the picture is its own crop and mirror image, so the latent is that of a constant tensor."""
    stored = read_all(encoded, "train") | read_all(encoded, "val")
    for number, grey in ((NUM_PHOTOS, 0), (NUM_PHOTOS + 1, 255)):
        known = encoder_moments(vae, np.full((3, SIZE, SIZE), grey, np.uint8))
        for key in (f"{number:08d}", f"{number:08d}-flip"):
            torch.testing.assert_close(stored[key][0], known, rtol=1e-4, atol=1e-4)


def test_manifest_says_how_it_was_made(vae, encoded):
    latents = open_latents(encoded)
    assert (latents.kind, latents.shape, latents.stored_shape) == ("moments_logvar", (4, 8, 8), (8, 8, 8))
    assert latents.meta["codec"] == {"_target_": "autoencoder.VAECodec", "path": str(vae), "scale": SCALE}
    assert latents.meta["flip"] == "both" and len(latents.meta["codec_sha256"]) == 64 and latents.num_classes == 3
    raw, _ = latents.read([0])
    x = latents.to_model_input(raw.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(dim=0), raw[0, :4] * SCALE, rtol=0, atol=0.1)


def test_killed_and_started_again_gives_the_same_bytes_on_any_number_of_processes(photos, vae, tmp_path):
    """Samples, with their noise: one process, against two that go on where one was killed after its first shard."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(settings(photos, whole, vae))
    process = subprocess.Popen(command(photos, cut, vae), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(cut.glob("*.tar")) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (cut / "meta.json").unlink(missing_ok=True)  # in case the machine was faster than the signal
    done = subprocess.run(command(photos, cut, vae, launcher=TORCHRUN[1:]), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in whole.glob("*.tar"))
    assert len(names) == 5 and names == sorted(path.name for path in cut.glob("*.tar"))
    for name in [*names, "meta.json"]:
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert not list(cut.glob(".*.tmp"))
    latents = open_latents(cut)
    assert (latents.kind, latents.shape, latents.dtype) == ("sample_scaled", (4, 8, 8), torch.float16)
    with pytest.raises(UserError, match="flip=none, not both"):
        main(settings(photos, cut, vae, "flip=both"))


def test_center_crop_keeps_the_middle():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200  # the middle square
    assert (center_crop(Image.fromarray(picture), 40) == 200).all()
    assert center_crop(Image.fromarray(picture), 20).shape == (3, 20, 20)
    ramp = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (128, 1, 3))
    halved = center_crop(Image.fromarray(ramp), 64)  # one box filter: the mean of two neighbours, 0.5 rounded up
    np.testing.assert_array_equal(halved[0, 0], np.arange(64) * 2 + 1)


def test_zip_and_tar_hold_the_same_pictures(photos, tmp_path):
    folder = open_images(photos)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive, tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in folder.names:
            archive.write(photos / name, f"train/{name}")  # one folder around all, as archives often have
            tar.add(photos / name, f"./train/{name}")
    for archive in ("all.zip", "all.tar"):
        images = open_images(tmp_path / archive)
        assert (images.labels, images.classes) == (folder.labels, folder.classes)
        assert images.read(3).tobytes() == folder.read(3).tobytes()


def test_labels_beside_pictures(photos, tmp_path):
    (tmp_path / "some").mkdir()
    names = ["b.png", "a.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "some" / name)
    (tmp_path / "some/dataset.json").write_text(json.dumps({"labels": [["a.png", 7], ["b.png", 5]]}))
    assert open_images(tmp_path / "some").labels == [7, 5]
    with tarfile.open(tmp_path / "wds.tar", "w") as tar:
        for key, label in (("0001", b"4"), ("0000", b"2")):
            for extension, contents in (("png", (tmp_path / "some/a.png").read_bytes()), ("cls", label)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(contents)
                tar.addfile(info, io.BytesIO(contents))
    assert open_images(tmp_path / "wds.tar").labels == [2, 4]


def test_what_encoding_refuses(photos, vae, tmp_path):
    (tmp_path / "bad/class").mkdir(parents=True)
    (tmp_path / "bad/class/a.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    cases = [
        ((tmp_path / "none", tmp_path / "o", vae), "is not there"),
        ((tmp_path / "empty", tmp_path / "o", vae), "holds no images"),
        ((tmp_path / "bad", tmp_path / "o1", vae), "class/a.jpg"),
        ((photos, tmp_path / "o", tmp_path / "no-vae"), "no-vae"),
        ((photos, tmp_path / "o", vae, "flip=all"), "flip=all; needed: none or both"),
        ((photos, tmp_path / "o", vae, "val=26"), "val=26 of 26 images"),
    ]
    for arguments, message in cases:
        with pytest.raises(cli.USER_ERRORS, match=message):
            main(settings(*arguments))
    assert not list(tmp_path.glob("o*/meta.json"))


def test_a_damaged_picture_is_skipped_or_deleted_and_the_same_command_goes_on(photos, vae, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "set", symlinks=True)
    bad = tmp_path / "set" / "flower" / "3.jpg"
    whole = settings(tmp_path / "set", tmp_path / "whole", vae, "shard_size=5")
    main(whole)
    bad.write_bytes(bad.read_bytes()[:200])
    ours = settings(tmp_path / "set", tmp_path / "ours", vae, "shard_size=5")
    with pytest.raises(UserError, match="3.jpg .*damaged.*; needed: on_error=skip, or the picture deleted"):
        main(ours)
    made = len(list((tmp_path / "ours").glob("*.tar")))
    main([*ours, "on_error=skip"])
    assert "left out (on_error=skip): " in capsys.readouterr().err
    shards = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    assert sum((tmp_path / "ours" / name).read_bytes() != shard for name, shard in shards.items()) == 1 > made - 6
    assert len(open_latents(tmp_path / "ours")) == 25
    shutil.rmtree(tmp_path / "ours")
    with pytest.raises(UserError, match="3.jpg"):
        main(ours)
    bad.unlink()
    main(ours)
    assert "1 pictures are gone since the start, and left out: flower/3.jpg first" in capsys.readouterr().err
    assert sum((tmp_path / "ours" / name).read_bytes() != shard for name, shard in shards.items()) == 1
    (tmp_path / "set" / "flower").rename(tmp_path / "set" / "a flower")
    with pytest.raises(UserError, match="needed: the same pictures, or an empty folder"):
        main(ours)


def test_linked_class_folders_are_read_and_loops_end(photos, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("china", "flower"):
        shutil.copytree(photos / name, tmp_path / "set" / name)
    (tmp_path / "set/house").symlink_to(photos / "plain")
    (tmp_path / "set/china/again").symlink_to(tmp_path / "set")
    for one, other in (("china", "flower"), ("flower", "china")):
        (tmp_path / "other" / one).mkdir(parents=True)
        shutil.copy(photos / one / "0.jpg", tmp_path / "other" / one)
        (tmp_path / "other" / one / "link").symlink_to(tmp_path / "other" / other)
    images = open_images(tmp_path / "set")
    assert images.classes == ["china", "flower", "house"] and images.labels.count(2) == 2
    assert len(images) == NUM_PHOTOS + 2
    names = open_images(tmp_path / "other").names
    assert names == ["china/0.jpg", "china/link/0.jpg", "flower/0.jpg", "flower/link/0.jpg"]


def test_every_format_keeps_its_classes(tmp_path):
    for number, suffix in enumerate((".png", ".tiff", ".gif", ".JPEG", ".tif", ".webp", ".bmp")):
        (tmp_path / "set" / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (250, 250, 250)).save(tmp_path / "set" / f"class{number}/a{suffix}")
    (tmp_path / "set/class9").mkdir()
    (tmp_path / "set/class9/b.heic").write_bytes(b"?")
    (tmp_path / "set/.DS_Store").write_bytes(b"?")
    images = open_images(tmp_path / "set")
    assert images.labels == list(range(7)) and images.others == ["class9/b.heic"]
    assert all(abs(int(np.asarray(images.read(i)).mean()) - 250) <= 1 for i in range(7))


def test_pictures_that_are_left_out_are_said(photos, vae, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "set")
    (tmp_path / "set/plain/c.heic").write_bytes(b"?")
    main(settings(tmp_path / "set", tmp_path / "out", vae))
    assert f"warning: {tmp_path}/set: files that are not pictures are left out: 1 .heic" in capsys.readouterr().err


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name, array in (("a.png", ramp * 257), ("b.tiff", ramp * 257)):
        Image.fromarray(array).save(tmp_path / name)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "c.tiff")
    images = open_images(tmp_path)
    for i in (0, 1):
        np.testing.assert_array_equal(np.asarray(images.read(i)), np.repeat(ramp.astype(np.uint8)[..., None], 3, 2))
    with pytest.raises(UserError, match="c.tiff has mode F; needed: 8 or 16 bits"):
        images.read(2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:8, :8, 0] = upright[16:, 8:, 1] = 255  # no symmetry
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = [  # what a camera stores so that its orientation tag turns it upright
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.transpose(1, 0, 2),
        np.rot90(upright), np.rot90(upright.transpose(1, 0, 2), 2), np.rot90(upright, -1),
    ][orientation - 1]  # fmt: skip
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_images(tmp_path).read(0)), upright)


def test_animations_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="a.gif has 3 frames; needed: one"):
        open_images(tmp_path).read(0)


def test_splits_are_not_classes(photos, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(photos, tmp_path / "imagenet/Data/CLS-LOC" / split)
    with pytest.raises(UserError, match="imagenet has train, val as class folders; needed: the path of one split"):
        _ = open_images(tmp_path / "imagenet").labels
    assert open_images(tmp_path / "imagenet/Data/CLS-LOC/train").classes == ["china", "flower", "plain"]


def test_labels_of_many_classes_are_found_at_once():
    names = [f"class{i:06d}/{i}.png" for i in range(30_000)]
    start = time.process_time()
    assert Images(Path("set"), names, Tree(names, None)).labels == list(range(30_000))
    assert time.process_time() - start < 1


def test_process_0_does_not_wait_for_a_dead_process(photos, vae, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 shards are missing, train-000001.tar first, and none has grown for 1 s"):
        main(settings(photos, tmp_path / "out", vae, "timeout_s=1"))
    monkeypatch.setenv("RANK", "1")
    main(settings(photos, tmp_path / "out", vae))
    monkeypatch.setenv("RANK", "0")
    main(settings(photos, tmp_path / "out", vae))
    assert len(open_latents(tmp_path / "out")) == NUM_PHOTOS + 2


def test_process_0_waits_while_shards_grow(tmp_path):
    def write_slowly() -> None:
        for size in range(8):
            (tmp_path / ".train-000000.tar.7.tmp").write_bytes(bytes(size))
            time.sleep(0.3)
        os.replace(tmp_path / ".train-000000.tar.7.tmp", tmp_path / "train-000000.tar")

    writer = threading.Thread(target=write_slowly)
    writer.start()
    wait_for_shards(tmp_path, ["train-000000.tar"], timeout_s=1)
    writer.join()


def bash_lines(text):
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def test_every_command_of_the_page_on_data(photos, vae, tmp_path):
    """From pictures to a training step, then foreign latents and bare shards, as docs/data.md has it, on small sets."""
    lines = bash_lines((ROOT / "docs/data.md").read_text())
    assert len(lines) == 6
    features, labels = tmp_path / "their-latents/imagenet256_features", tmp_path / "their-latents/imagenet256_labels"
    for folder in (features, labels, tmp_path / "their-shards"):
        folder.mkdir(parents=True)
    for i in range(4):
        np.save(features / f"{i}.npy", np.ones((1, 4, 8, 8), np.float32))
        np.save(labels / f"{i}.npy", np.array([i]))
    samples = [(f"{i}", np.ones((4, 8, 8), np.float16), i) for i in range(4)]
    write_shard(tmp_path / "their-shards/train-0.tar", samples)
    tiny_training = [
        f"results_dir={tmp_path}/runs", "data.input_size=8", f"data.codec.path={vae}", "data.num_workers=0",
        "train.max_steps=1", "train.global_batch_size=4", "train.compile=off", "preview.every=0",
    ]  # fmt: skip
    for line in lines:
        for name in ("pictures", "datasets/mine", "datasets/theirs", "their-latents", "their-shards"):
            line = re.sub(rf"(?<=[ =]){name}\b", str(tmp_path / name) if name != "pictures" else str(photos), line)
        line = line.split("#")[0].replace("stabilityai/sd-vae-ft-ema", str(vae)).replace("val=500", "val=4")
        program, *arguments = line.removeprefix("accelerate launch").removeprefix("python").split()
        if program == "-m":
            assert arguments[0] == "data" and data.__main__.main(arguments[1:]) == 0, line
        elif program == "scripts/encode_latents.py":
            main([*arguments, f"size={SIZE}", f"scale={SCALE}"])
        else:
            command_line = [sys.executable, program, *arguments, *tiny_training]
            done = started.run(command_line)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert list((tmp_path / "runs").glob("*/metrics.jsonl"))
