"""Every damage of the data is seen and named, by shard, key and byte; nothing is silently left out, written or run."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

import data.__main__
import data.index
from data import BatchPlan, make_loader, open_latents
from data.archives import npy_header
from data.inspect import as_text, inspect
from data.loader import Order
from data.shards import read_manifest, shard_name, write_manifest
from system import UserError
from system.files import atomic_file, sha256_of
from tests.conftest import Canary, failing_reads
from tests.made_sets import NUM_CLASSES, SHAPE, TOTAL, array_of, good, npy, numbers_in, write_members, write_set

NAN = array_of(1)
NAN[1, 2, 3] = np.nan


def sample(array: bytes, label: bytes = b"1") -> list[tuple]:
    return [("0001.latent.npy", array), ("0001.cls", label)]


SOUND = npy(array_of(1))
OBJECTS = npy(np.array([Canary("canary")], dtype=object), allow_pickle=True)
BAD_SAMPLES = {  # name: (members of sample 0001, what is said)
    "nan": (sample(npy(NAN)), "not finite"),
    "shape": (sample(npy(array_of(1)[:3])), r"\(3, 4, 4\); needed: float16 \(4, 4, 4\)"),
    "dtype": (sample(npy(array_of(1).astype(np.float32))), "is float32"),
    "integers": (sample(npy(array_of(1).astype(np.int16))), "needed: float16 or float32"),
    "fortran": (sample(npy(np.asfortranarray(array_of(1)))), "Fortran order"),
    "objects": (sample(OBJECTS), "pickled objects, which are never read"),
    "short": (sample(SOUND[:-2]), "126 bytes of numbers"),
    "no array": (sample(b"nothing"), "not a .npy array"),
    "label too large": (sample(SOUND, b"10"), r"label that says '10'; needed: a whole number, 0..9"),
    "label negative": (sample(SOUND, b"-1"), r"label that says '-1'; needed: a whole number, 0..9"),
    "label is text": (sample(SOUND, b"cat"), "label that says 'cat'"),
    "no label": (sample(SOUND)[:1], "has no .cls"),
    "no latent": (sample(SOUND)[1:], "has no .latent.npy"),
}


@pytest.fixture
def damaged(tmp_path):
    """Makes a set of two shards: sample 0 and the given members in the first, samples 2, 3 and 4 in the second."""

    def make(members: list[tuple]) -> Path:
        folder = tmp_path / "damaged"
        folder.mkdir()
        write_members(folder / "train-000000.tar", [*good(0), *members])
        write_members(folder / "train-000001.tar", good(2) + good(3) + good(4))
        shards = [
            {"name": f"train-00000{s}.tar", "split": "train", "n": n, "sha256": None} for s, n in ((0, 2), (1, 3))
        ]
        manifest = dict.fromkeys("bias codec codec_sha256 scale counts mean std".split())
        for shard in shards:
            shard["sha256"] = sha256_of(folder / shard["name"])
        manifest |= {
            "kind": "sample_scaled",
            "shape": SHAPE,
            "dtype": "float16",
            "num_classes": NUM_CLASSES,
            "flip": "none",
        }
        write_manifest(folder, {**manifest, "shards": shards})
        return folder

    return make


def check_stopped_and_skipped(folder: Path, message: str, capfd) -> None:
    """`stop` names the fault in one line; `skip` reads what is left, and says and counts what is not."""
    with pytest.raises(UserError, match=message) as error:
        open_latents(folder)
    assert "\n" not in str(error.value)
    latents = open_latents(folder, on_error="skip")
    assert numbers_in(latents.read(range(len(latents)))[0]) == [0, 2, 3, 4]
    assert len(latents.faults) == 1 and latents.faults[0] in capfd.readouterr().err


@pytest.mark.parametrize("defect", BAD_SAMPLES)
def test_bad_sample_is_named(damaged, defect, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members, message = BAD_SAMPLES[defect]
    folder = damaged(members)
    at = tarfile.open(folder / "train-000000.tar").getmembers()[2].offset_data
    check_stopped_and_skipped(folder, rf"train-000000.tar: sample '0001' at byte {at} .*{message}", capfd)
    assert inspect(folder)["wrong"] == open_latents(folder, on_error="skip").faults
    assert os.listdir(tmp_path) == ["damaged"]


def test_double_key_is_named(damaged):
    folder = damaged([*good(1), ("0000.latent.npy", npy(array_of(9)))])
    with pytest.raises(UserError, match=r"train-000000.tar: sample '0000' at byte \d+ has a second .latent.npy"):
        open_latents(folder)
    assert numbers_in(open_latents(folder, on_error="skip").read([0, 1])[0]) == [0, 1]  # the first one counts


CRAFTED = {
    "symbolic link": (
        ("0001.latent.npy", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        "link or a device",
    ),
    "hard link": (("0001.latent.npy", b"", {"type": tarfile.LNKTYPE, "linkname": "../secret"}), "link or a device"),
    "device": (("0001.latent.npy", b"", {"type": tarfile.CHRTYPE}), "link or a device"),
    "parent folder": (("../outside.latent.npy", b"x"), "points outside"),
    "absolute": (("/outside.cls", b"x"), "points outside"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_members_are_refused(damaged, name, capfd, tmp_path):
    member, message = CRAFTED[name]
    check_stopped_and_skipped(damaged([member]), f"train-000000.tar: member .* at byte .*{message}", capfd)
    assert os.listdir(tmp_path) == ["damaged"]


def test_absurd_size_is_refused(damaged, capfd):
    folder = damaged([("0001.latent.npy", npy(array_of(1)))])
    info = tarfile.TarInfo("0001.latent.npy")
    info.size = 7 << 30
    contents = (folder / "train-000000.tar").read_bytes()
    at = contents.index(b"0001.latent.npy")
    (folder / "train-000000.tar").write_bytes(contents[:at] + info.tobuf(tarfile.USTAR_FORMAT) + contents[at + 512 :])
    check_stopped_and_skipped(folder, "claims 7516192768 bytes", capfd)


def test_truncation_anywhere_is_seen(tmp_path):
    """50 cuts, at member boundaries too, with and without a manifest: never a silently shorter set."""
    whole = write_set(tmp_path / "whole", sizes=[6])
    contents = (whole / "train-000000.tar").read_bytes()
    last = tarfile.open(whole / "train-000000.tar").getmembers()[-1]
    end_of_members = last.offset_data + 512  # after it there are only blocks of zeros
    cuts = {*range(512, end_of_members, 512), *np.linspace(1, end_of_members - 1, 30).astype(int).tolist()}
    assert len(cuts) >= 50
    for cut in cuts:
        for manifest in (True, False):
            folder = tmp_path / f"{cut}-{manifest}"
            folder.mkdir()
            (folder / "train-000000.tar").write_bytes(contents[:cut])
            if manifest:
                (folder / "meta.json").write_bytes((whole / "meta.json").read_bytes())
            with pytest.raises(UserError, match="train-000000.tar: .*(cut off|has no .cls|has no .latent.npy)"):
                open_latents(folder)


def test_manifest_sees_a_shard_of_other_contents(tmp_path):
    folder = write_set(tmp_path / "set", sizes=[6, 3])
    write_members(folder / "train-000000.tar", good(0))
    with pytest.raises(
        UserError, match="train-000000.tar: its sha256 is not the one in meta.json: 1 samples, needed 6"
    ):
        open_latents(folder)
    assert len(open_latents(folder, on_error="skip")) == 3


def flip_bit(path: Path, at: int, keep_time: bool) -> None:
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_bit_flip_is_seen_wherever_it_happens(tmp_path):
    folder = write_set(tmp_path / "set", sizes=[6, 3])
    shard = folder / "train-000000.tar"
    member = tarfile.open(shard).getmember("0003.latent.npy")
    at, sample = member.offset_data + 140, f"train-000000.tar: sample '0003' at byte {member.offset_data} has changed"
    flip_bit(shard, at, keep_time=True)  # unnoticed by the index: found when the sample is read
    latents = open_latents(folder)
    assert numbers_in(latents.read([0, 1, 2, 4])[0]) == [0, 1, 2, 4]
    with pytest.raises(UserError, match=sample):
        latents.read([2, 3])
    assert inspect(folder)["wrong"] == [sample]
    flip_bit(shard, at, keep_time=True)
    flip_bit(shard, at, keep_time=False)  # with a new time: found when the set is opened
    with pytest.raises(UserError, match=sample):
        open_latents(folder)
    without_index(folder)  # nothing records the sample any more
    with pytest.raises(UserError, match="train-000000.tar: its sha256 is not the one in meta.json"):
        open_latents(folder)
    flip_bit(shard, member.offset_data - 512 + 124, keep_time=False)  # in the header
    with pytest.raises(
        UserError, match=f"train-000000.tar: has a damaged tar header at byte {member.offset_data - 512}"
    ):
        open_latents(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sample_that_turns_bad_is_replaced_and_counted(tmp_path, num_workers, capfd):
    folder = write_set(tmp_path / "set")
    latents, skipping = open_latents(folder), open_latents(folder, on_error="skip")
    shard = folder / "train-000002.tar"
    for key in ("0020", "0021"):
        flip_bit(shard, tarfile.open(shard).getmember(f"{key}.latent.npy").offset_data + 200, keep_time=True)
    plan, settings = BatchPlan(16, 16, 1, 0, 1), dict(num_steps=2 * TOTAL // 16, num_workers=num_workers)
    stream = [n for raw, y in make_loader(skipping, plan, **settings) for n in numbers_in(raw)]
    expected = Order(TOTAL, seed=0)(np.arange(2 * TOTAL))
    assert stream == [22 if i in (20, 21) else i for i in expected]  # never a shorter epoch, and the same for everybody
    assert len(skipping.faults) == 2 and capfd.readouterr().err.count("has changed since it was indexed") == 2
    with pytest.raises(UserError, match="sample '002[01]' at byte") as error:
        list(make_loader(latents, plan, **settings))
    assert "\n" not in str(error.value)


def test_shard_deleted_or_cut_while_reading(tmp_path):
    folder = write_set(tmp_path / "set", sizes=[3, 3, 3])
    latents = open_latents(folder)
    latents.read([0])
    for shard in (0, 1):
        (folder / shard_name("train", shard)).unlink()
    assert numbers_in(latents.read([2])[0]) == [2]  # an open shard stays readable
    with pytest.raises(UserError, match="train-000001.tar: No such file"):
        latents.read([4])
    latents.read([6])
    os.truncate(folder / shard_name("train", 2), 2000)
    with pytest.raises(UserError, match="train-000002.tar: sample .* is cut off"):
        latents.read([8])
    with pytest.raises(UserError, match="train-000000.tar: No such file or directory .and 2 more faults"):
        open_latents(folder)


def test_empty_shard(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_members(folder / "train-0.tar", good(0))
    write_members(folder / "train-1.tar", [])
    with pytest.raises(UserError, match="train-1.tar: holds no .latent.npy$"):
        open_latents(folder)
    (folder / "train-1.tar").write_bytes(b"")
    with pytest.raises(UserError, match="train-1.tar: is cut off"):
        open_latents(folder)
    write_members(folder / "train-1.tar", [("0.latent", b"pickle"), ("0.cls", b"1")])
    with pytest.raises(UserError, match="train-1.tar: holds no .latent.npy, but .latent; python -m data inspect"):
        open_latents(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: "{", "is not JSON"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "kind"}), "does not say kind"),
        (lambda m: json.dumps([m]), "holds a list"),
        (lambda m: json.dumps({**m, "kind": "raw"}), "kind=raw; needed: "),
        (
            lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "name": "../train-000000.tar"}]}),
            "a file in that folder",
        ),
        (
            lambda m: json.dumps({**m, "shards": [{**m["shards"][0], "split": "/../../x"}]}),  # a part of a file's name
            "split=/../../x; needed: train or val",
        ),
        (lambda m: json.dumps({**m, "num_classes": 2**31 - 1}), "num_classes=2147483647; needed: "),
    ],
)
def test_bad_manifest_is_refused(tmp_path, change, message):
    folder = write_set(tmp_path / "set", sizes=[2])
    (folder / "meta.json").write_text(change(read_manifest(folder)))
    with pytest.raises(UserError, match=message):
        open_latents(folder)


def test_atomic_file_appears_whole_or_not_at_all(tmp_path):
    with atomic_file(tmp_path / "a") as file:
        file.write(b"1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as file:
        file.write(b"2")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"1" and os.listdir(tmp_path) == ["a"]


def test_inspect_lists_damage(damaged, capsys):
    assert data.__main__.main(["inspect", str(damaged(BAD_SAMPLES["nan"][0]))]) == 1
    assert "sample '0001' at byte 2560 has numbers that are not finite" in capsys.readouterr().out


def test_every_flipped_bit_of_a_header_is_an_array_or_a_user_error():
    header = npy(np.zeros((1, 28, 28), np.float16))[:128]
    refused = 0
    for bit in range(8 * len(header)):
        flipped = bytearray(header)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            npy_header(bytes(flipped), 128 + 2 * 28 * 28)
        except UserError:
            refused += 1
    assert refused > 500  # the others change padding, or a dtype of as many bytes


@pytest.fixture
def fail():
    with failing_reads() as fail:
        yield fail


def without_index(folder: Path) -> Path:
    for path in folder.glob(".*.index.npz"):
        path.unlink()
    return folder


def test_read_error_that_passes_is_not_damage(tmp_path, fail):
    folder = without_index(write_set(tmp_path / "set", sizes=[6, 3]))
    fail("train-000001.tar", times=1)
    assert len(open_latents(folder)) == 9


def test_read_errors_are_not_remembered(tmp_path, fail, capfd):
    folder = without_index(write_set(tmp_path / "set", sizes=[6, 3]))
    fail("train-000001.tar", times=10**6)
    assert len(open_latents(folder, on_error="skip")) == 6
    assert "train-000001.tar: Input/output error" in capfd.readouterr().err
    with pytest.raises(UserError, match="train-000001.tar: Input/output error"):
        open_latents(folder)
    fail("train-000001.tar", times=0)
    assert len(open_latents(folder)) == 9


def test_a_label_that_no_network_has_takes_no_memory(tmp_path):
    """An inspection counts the entries of every class up to the largest label."""
    folder = write_set(tmp_path / "set", sizes=[2])
    members = [("0.latent.npy", npy(array_of(0))), ("0.cls", b"2147483647")]
    write_members(folder / "train-000000.tar", good(1) + members)
    (folder / "meta.json").unlink()
    assert "has a label that says '2147483647'; needed: a whole number, 0..1048575" in inspect(folder)["wrong"][0]


def test_names_of_several_lines_are_one_in_a_report(tmp_path):
    folder = write_set(tmp_path / "set", sizes=[20])
    about = read_manifest(folder)
    write_manifest(folder, about | {"classes": ["a\nnext      rm -r", *map(str, range(1, about["num_classes"]))]})
    assert as_text(inspect(folder)).count("\nnext ") == 1
