"""data=emoji: what is held out, the shards, what is missing, and the score of retrieval."""

import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data.prepared
from checkpoints.config import Settings
from checkpoints.run_folder import CONDITIONS_FILE
from conditions import normalize
from data import emoji, open_latents, prepare
from data.emoji import HAIR, MAN, PERSON, SKIN, TONE, UNTOLD, WOMAN, parts
from scripts import retrieval
from scripts.retrieval import chosen, ranks
from system import UserError, cli
from system.settings import parse
from tests.made_runs import make_run
from tests.made_texts import MadeEncoder

JOINT = "\u200d"
PROFESSIONS = [JOINT + chr(code) for code in range(0x1F680, 0x1F6C0)]
GESTURES = [chr(code) for code in (*range(0x1F440, 0x1F460), *range(0x1F590, 0x1F5A0))]
THINGS = [chr(code) for code in range(0x1F400, 0x1F420)]


def made_catalogue() -> dict[str, str]:
    """{sequence: caption}: professions of three genders, gestures, both in five tones and without, couples, things."""
    told = {THINGS[i]: f"thing{i}" for i in range(len(THINGS))}
    tones = {"": "", **{tone: f" tone{i}" for i, tone in enumerate(SKIN)}}
    for tone, said in tones.items():
        told |= {gesture + tone: f"gesture{i}{said}" for i, gesture in enumerate(GESTURES)}
        for person, named in ((PERSON, "person"), (MAN, "man"), (WOMAN, "woman")):
            told |= {person + tone + what: f"{named} job{i}{said}" for i, what in enumerate(PROFESSIONS)}
    hearts = {
        MAN + a + JOINT + "\u2764\ufe0f" + JOINT + WOMAN + b: f"couple{x}{y}"
        for a, x in tones.items()
        for b, y in tones.items()
    }
    return told | {sequence: said for sequence, said in hearts.items() if len(TONE.findall(sequence)) != 1}


@pytest.fixture
def made(monkeypatch):
    """data=emoji without a font, the package emoji or an encoder."""
    told = made_catalogue()
    monkeypatch.setattr(emoji, "find_font", lambda source: Path(__file__))
    monkeypatch.setattr(emoji, "open_font", lambda path: None)
    monkeypatch.setattr(emoji, "catalogue", lambda font: told)
    monkeypatch.setattr(emoji, "names", lambda: told)
    monkeypatch.setattr(emoji, "draw", picture_of)
    monkeypatch.setattr(data.prepared, "load_encoder", lambda name, length: MadeEncoder(length))
    return told


def picture_of(font, sequence, height, width):
    seed = zlib.crc32(sequence.encode())
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), np.uint8)


def test_one_in_ten_is_held_out_and_each_part_is_seen():
    told = made_catalogue()
    part = parts(told)
    toned = [s for s in told if TONE.search(s) and part[s] != "pair"]
    assert 0.07 < np.mean([part[s] == "tone" for s in toned]) < 0.13
    pairs = {(s[0], TONE.sub("", s)[1:]) for s in told if s[0] in PERSON + MAN + WOMAN and "\u2764" not in s}
    held = {(s[0], TONE.sub("", s)[1:]) for s in told if part[s] == "pair"}
    assert 0.05 < len(held) / len(pairs) < 0.2 and len({what for _, what in held}) == len(held)  # one gender of each
    assert {person for person, _ in held} == {PERSON, MAN, WOMAN}
    for sequence, found in part.items():
        of_pair = (sequence[0], TONE.sub("", sequence)[1:]) in held
        assert (found == "pair") == of_pair and (found != "tone" or TONE.search(sequence))  # in all tones, and without
    seen = {word for sequence in told if part[sequence] == "seen" for word in told[sequence].split()}
    assert {word for said in told.values() for word in said.split()} == seen
    few = {s: told[s] for i, s in enumerate(told) if i % 7}  # another font: what it has is held out alike
    assert {s: p for s, p in parts(few).items() if p == "tone"} == {s: "tone" for s in few if part[s] == "tone"}


def test_directions_styles_and_signs_are_one_base():
    runner = "\U0001f3c3"
    signs, ways = ("", "\u200d\u2642\ufe0f", "\u200d\u2640\ufe0f"), ("", "\u200d\u27a1\ufe0f")
    told = [runner + tone + sign + way for tone in ("", SKIN[1]) for sign in signs for way in ways]
    assert {UNTOLD.sub("", TONE.sub("", s)) for s in told} == {runner, runner + "\u200d\u2642", runner + "\u200d\u2640"}
    assert parts([PERSON + JOINT + "\U0001f384"]) == {PERSON + JOINT + "\U0001f384": "seen"}  # of one gender alone
    family = [MAN + JOINT + "\U0001f466", WOMAN + JOINT + "\U0001f466"]
    assert set(parts(family).values()) == {"seen"}
    assert (
        emoji.sequence_of(emoji.key(told[-1])) == told[-1]
        and emoji.key("\U0001f468\u200d\U0001f692") == "1f468-200d-1f692"
    )
    assert re.fullmatch(TONE, JOINT + HAIR[0])


def test_shards_are_made_once(made, tmp_path):
    def make(**more):
        prepare(**dict(name="emoji", path=tmp_path / "made", size=(6, 8), text_encoder="made", text_length=5) | more)

    make()
    part = parts(made)
    for split, wanted in (("train", {"seen"}), ("val", {"tone", "pair"})):
        latents = open_latents(tmp_path / "made", split=split, condition="text")
        sequences = list(map(emoji.sequence_of, latents.keys(range(len(latents)))))
        assert {part[sequence] for sequence in sequences} == wanted and latents.shape == (3, 6, 8)
        raw, text = latents.read(range(20))
        for i, sequence in enumerate(sequences[:20]):
            pixels = ((raw[i].float() + 1) * 127.5).round().numpy()
            np.testing.assert_array_equal(pixels, picture_of(None, sequence, 6, 8))
            told = normalize(MadeEncoder(5)([made[sequence]]), latents.text_stats)
            assert torch.equal(text.states[i], told.states[0])
    assert open_latents(tmp_path / "made", split="val", condition="text").text_stats.mean.equal(latents.text_stats.mean)
    made_at = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}
    make()
    make(source="another name of the font")
    assert made_at == {path: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}
    with pytest.raises(UserError, match="was begun with text_length=5, not 4; needed: the same settings"):
        make(text_length=4, source="font")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/cat.png").touch()
    with pytest.raises(UserError, match="pictures holds cat.png, which is not of the data set"):
        make(path=tmp_path / "pictures")


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "FONTS", [tmp_path / "nowhere.ttf"])
    for source, said in (
        (None, "no font of colour emoji is on this machine; needed: apt-get install fonts-noto-color-emoji, or"),
        (tmp_path / "other.ttf", "other.ttf is not there; needed: the file of a bitmap colour font"),
    ):
        with pytest.raises(UserError, match=said):
            prepare("emoji", tmp_path / "made", source, text_encoder="minilm", text_length=24)
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(UserError, match="text.ttf is no font, or has no bitmaps that are 109"):
        emoji.open_font(tmp_path / "text.ttf")
    assert not (tmp_path / "made").exists()
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(UserError, match="names of emoji need the package emoji: pip install emoji"):
        emoji.catalogue(None)


def test_a_font_of_letters_is_refused():
    pytest.importorskip("emoji")
    import matplotlib

    font = emoji.open_font(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    with pytest.raises(UserError, match=r"DejaVuSans.ttf draws \d+ of \d+ emoji; needed: a bitmap colour font"):
        emoji.catalogue(font)


@pytest.mark.slow
def test_the_font_of_this_system():
    pytest.importorskip("emoji")
    found = next((path for path in emoji.FONTS if path.is_file()), None)
    if found is None:
        pytest.skip("no font of colour emoji")
    font = emoji.open_font(found)
    told = emoji.catalogue(font)
    assert len(told) > 3000 and len(set(told.values())) == len(told)
    part = parts(told)
    seen = {word for sequence in told if part[sequence] == "seen" for word in told[sequence].split()}
    assert {word for said in told.values() for word in said.split()} <= seen
    wanted = next(sequence for sequence, said in told.items() if said == "woman firefighter medium-dark skin tone")
    pixels = emoji.draw(font, wanted, 32, 32)
    assert pixels.shape == (3, 32, 32) and pixels[:, 0, 0].min() > 200 and pixels.std() > 30


def test_ranks_are_those_of_all_distances():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (90, 48))).double()
    pixels[7] = pixels[3]  # the same picture twice: each retrieves the other
    asked = [3, 7, *range(10, 80)]
    made = (pixels[asked] + torch.from_numpy(rng.integers(-400, 400, (72, 48)))).clamp(0, 255)
    plain = [
        int(((made[i] - pixels) ** 2).sum(1).lt(((made[i] - pixels[j]) ** 2).sum()).sum()) for i, j in enumerate(asked)
    ]
    assert ranks(made, pixels, asked).tolist() == plain and max(plain) > 5
    assert ranks(pixels[asked], pixels, asked).tolist() == [0] * 72
    assert chosen(["seen", "tone", "seen", "pair", "seen"], 2) == [0, 4, 1, 3]


def test_a_perfect_run_retrieves_all(made, tmp_path, monkeypatch):
    keys = ["experiment=emoji", f"data.path={tmp_path / 'made'}", "data.text_width=8", "data.text_length=5"]
    keys += [
        "data.input_size=8",
        f"+data.text_sha256={MadeEncoder.sha256}",
        "model.hidden_size=32",
        "model.num_heads=2",
    ]
    settings = parse(Settings, cli.load_config("config", keys))
    assert settings.data.text_encoder == "minilm" and settings.optimizer.name == "muon"
    prepare("emoji", tmp_path / "made", size=8, text_encoder="made", text_length=5)
    latents = open_latents(tmp_path / "made", split="val", condition="text")
    run = make_run(tmp_path / "run", keys, kept=latents.conditions(64), stats=latents.text_stats)
    assert (run / "checkpoints/step_0000001" / CONDITIONS_FILE).is_file()
    everything = retrieval.read_catalogue(retrieval.load_run(run, device="cpu"), tmp_path / "made")
    right = {states.numpy().tobytes(): row for states, row in zip(everything.texts.states, everything.pixels)}

    def copy(run, guidance, seeds, texts, batch_size, steps):
        for states in texts.states:  # the picture that the caption names
            yield right[states.numpy().tobytes()].view(1, 3, 8, 8).to(torch.uint8)

    grids, settings = [], [f"ckpt={run}", f"catalogue={tmp_path / 'made'}", "seen=20", "steps=1", "batch_size=50"]
    retrieval.main([*settings, f"out={tmp_path / 'real'}", "scale=1.0,2.0"])
    assert len(list((tmp_path / "real").rglob("held_out.png"))) == 2
    monkeypatch.setattr(retrieval, "generate", copy)
    monkeypatch.setattr(retrieval.gallery, "save_grid", lambda *grid: grids.append(grid))
    retrieval.main([*settings, f"out={tmp_path / 'perfect'}"])
    ((pictures, _, _, captions),) = grids
    held_out = {caption for sequence, caption in made.items() if parts(made)[sequence] != "seen"}
    assert pictures[::2].equal(pictures[1::2]) and captions[::2] == captions[1::2] and len(set(captions)) == 24
    assert set(captions) <= held_out
    pictures = torch.zeros(len(made), 3, 8, 8, dtype=torch.uint8)
    retrieval.save_held_out(everything, range(len(made)), pictures, {}, None)  # another package emoji lacks the names
    assert {made[emoji.sequence_of(key)] for key in grids[-1][3]} <= held_out
    found = json.loads((tmp_path / "perfect/metrics.json").read_text())
    held = [part for part in parts(made).values() if part != "seen"]
    assert (found["n_seen"], found["n_tone"], found["n_pair"]) == (20, held.count("tone"), held.count("pair"))
    assert found["seeds"] == f"0-{19 + len(held)}" and found["catalogue"] == len(made)
    for part in retrieval.PARTS:
        assert found[f"top1_{part}"] == found[f"top5_{part}"] == 1.0
        assert found[f"nearest_seen_top1_{part}"] == 0  # another picture is never nearest
    assert found["missed_held_out"] == 0 and found["chance_top5"] == 5 / len(made)
    rows = (tmp_path / "real/retrieval.md").read_text().splitlines()
    assert len(rows) == 2 + 2 * 3 and len([*(tmp_path / "real").glob("*/metrics.json")]) == 2
    assert json.loads(next((tmp_path / "real").glob("*/metrics.json")).read_text())["missed_held_out"] > 0.9
    prepare("emoji", tmp_path / "flat", size=(6, 8), text_encoder="made", text_length=5)
    with pytest.raises(UserError, match=r"holds pictures of \(3, 6, 8\); needed: \(3, 8, 8\)"):
        retrieval.main([*settings, f"catalogue={tmp_path / 'flat'}", f"out={tmp_path / 'none'}"])
    (tmp_path / "made/texts.safetensors").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="texts.safetensors is missing"):
        retrieval.main([*settings, f"out={tmp_path / 'none'}"])


def test_another_set_is_no_catalogue():
    with pytest.raises(UserError, match="ckpt"):
        retrieval.main([])
    for key in ("photo", "d800", "110000"):  # half a character, and one too many
        with pytest.raises(UserError, match=f"sample '{key}' is no emoji"):
            emoji.sequence_of(key)
