"""Conditions of the three kinds: class labels as they always were, texts by the same draws, and none."""

import pytest
import torch

import conditions
from conditions import Text, another, check, choose, drop, join, kind_of, labels_of, repeat, rows, size, to
from randomness import BatchSlice, seeded_generator, uniform
from system import UserError

CLASSES, NULL_CLASS = torch.arange(10), torch.tensor([10])


def texts(lengths: list[int], width: int = 3, dtype: torch.dtype = torch.float32) -> Text:
    """Text i holds the number i + 1 in all its tokens."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    numbers = torch.arange(1, len(lengths) + 1, dtype=dtype)[:, None, None]
    return Text((mask[:, :, None] * numbers).expand(-1, -1, width).contiguous(), mask)


def whose(text: Text) -> list[int]:
    """The number in the first token of each text."""
    return text.states[:, 0, 0].int().tolist()


POOL, NULL_TEXT = texts([2, 5, 1, 3]), Text(torch.zeros(1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
ALL = {"class": (CLASSES, NULL_CLASS), "text": (POOL, NULL_TEXT), "none": (None, None)}


@pytest.mark.parametrize("kind", ALL)
def test_kinds_rows_and_files(kind):
    condition, null = ALL[kind]
    assert kind_of(condition) == kind_of(null) == kind
    assert conditions.load(conditions.save(condition)) is None if kind == "none" else size(condition) > 3
    check(condition, null)
    for index in (slice(1, 3), [1, 2], torch.tensor([1, 2])):
        part = to(rows(condition, index), "cpu")
        assert kind_of(part) == kind and size(part) in (2, None)
        assert kind == "none" or whose_row(part) == whose_row(condition)[1:3]
    assert size(repeat(null, 4, "cpu")) in (4, None) and size(join(condition, repeat(null, 2, "cpu"))) in (12, 6, None)
    assert (labels_of(condition) is condition) == (kind in ("class", "none"))


def whose_row(condition) -> list[int]:
    return whose(condition) if isinstance(condition, Text) else condition.tolist()


def test_files_hold_what_was_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    for condition, _ in ALL.values():
        save_file(conditions.save(condition), tmp_path / "conditions.safetensors")
        again = conditions.load(load_file(tmp_path / "conditions.safetensors"))
        assert kind_of(again) == kind_of(condition)
        for a, b in zip(conditions.save(again).values(), conditions.save(condition).values()):
            assert torch.equal(a, b) and a.dtype == b.dtype
    with pytest.raises(UserError, match="conditions of captions; needed: labels"):
        conditions.load({"captions": CLASSES})


def test_texts_of_unequal_length_are_joined():
    both = join(rows(POOL, [0, 2]), texts([4, 7]))
    assert both.states.shape == (4, 7, 3) and both.mask.sum(1).tolist() == [2, 1, 4, 7]
    assert whose(both) == [1, 3, 1, 2] and not both.states[~both.mask].any()


def test_dropped_labels_are_as_training_drew_them():
    y, plan = torch.arange(6) % 3, BatchSlice(seeded_generator(0), 2, 12)
    before = torch.where(uniform(y.shape, BatchSlice(seeded_generator(0), 2, 12)) < 0.5, 3, y)
    assert torch.equal(drop(y, torch.tensor([3]), 0.5, plan), before) and before.dtype == torch.int64


def test_the_same_rows_of_texts_are_dropped_and_nothing_is_drawn_for_none():
    text = texts([1 + i % 5 for i in range(50)], dtype=torch.float16)
    labels = drop(torch.zeros(50, dtype=torch.int64), torch.tensor([1]), 0.3, seeded_generator("drop"))
    longer = Text(torch.full((1, 6, 3), 99.0), torch.ones(1, 6, dtype=torch.bool))  # a null longer than the texts
    for null, number in ((NULL_TEXT, 0), (longer, 99)):
        dropped = drop(text, null, 0.3, seeded_generator("drop"))
        kept = labels == 0
        assert 5 < int((~kept).sum()) < 25 and dropped.mask.shape[1] == max(5, null.mask.shape[1])
        assert torch.equal(dropped.mask[kept][:, :5], text.mask[kept])
        assert torch.equal(dropped.states[kept][:, :5], text.states[kept].to(dropped.states.dtype))
        assert (dropped.states[~kept][:, : null.mask.shape[1]] == number).all()
        assert (dropped.mask[~kept].sum(1) == null.mask.shape[1]).all()
    generator = seeded_generator("none")
    assert drop(None, None, 0.5, generator) is None
    assert torch.equal(uniform((3,), generator), uniform((3,), seeded_generator("none")))


def test_conditions_are_chosen_by_seed():
    seeds = range(40, 340)
    draws = [int(torch.randint(10, (), generator=seeded_generator("image", seed, "label"))) for seed in seeds]
    assert choose("random", seeds, CLASSES).tolist() == draws and min(map(draws.count, range(10))) > 15
    assert choose("balanced", [3, 12, 20], CLASSES).tolist() == [3, 2, 0]
    assert choose(7, [1, 2], CLASSES).tolist() == choose("7", [1, 2], CLASSES).tolist() == [7, 7]
    assert whose(choose("balanced", [0, 5, 7], POOL)) == [1, 2, 4] and whose(choose(2, [8], POOL)) == [3]
    assert len(set(whose(choose("random", seeds, POOL)))) == 4
    assert choose("random", [], CLASSES).shape == (0,) and choose("random", [], CLASSES).dtype == torch.int64
    assert choose("balanced", [1], None) is None
    for rule, pool, said in (
        (10, CLASSES, "label 10; needed: balanced, random or a class 0..9"),
        ("-1", CLASSES, "label -1; needed"),
        ("all", POOL, "label all; needed: balanced, random or a text 0..3"),
        (0, None, "label 0; needed: balanced, random; the network takes no condition"),
    ):
        with pytest.raises(UserError, match=said):
            choose(rule, [0], pool)


def test_another_condition_is_drawn_by_row():
    def streams() -> list[torch.Generator]:
        return [seeded_generator("image", seed, "weak label") for seed in range(200)]

    y = torch.zeros(200, dtype=torch.int64)
    before = (uniform(y.shape, streams()) * 10).long()
    assert torch.equal(another(y, CLASSES, streams()), before) and len(set(before.tolist())) == 10
    text = another(texts([1] * 200), POOL, streams())
    assert whose(text) == [int(u * 4) + 1 for u in uniform((200,), streams())] and text.mask.shape == (200, 5)
    with pytest.raises(UserError, match="the network takes none"):
        another(None, None, streams())


@pytest.mark.parametrize(
    "condition, null, said",
    [
        (POOL, NULL_CLASS, "the network takes class labels, and this is a text"),
        (None, NULL_CLASS, "the network takes class labels, and none is given"),
        (CLASSES, NULL_TEXT, "the network takes texts, and these are class labels"),
        (CLASSES, None, "the network takes no condition, and these are class labels; needed: data.condition=none"),
        (CLASSES - 1, NULL_CLASS, "labels -1..8; the model has classes 0..9"),
        (CLASSES + 1, NULL_CLASS, "labels 1..10; the model has classes 0..9"),
        (texts([2], width=8), NULL_TEXT, "texts of width 8; the network takes texts of width 3"),
    ],
)
def test_what_a_network_cannot_take_is_refused(condition, null, said):
    with pytest.raises(UserError, match=said):
        check(condition, null)


STATES, MASK, STATS = torch.zeros(2, 4, 3), torch.ones(2, 4).bool(), dict(mean=torch.zeros(3), null=torch.zeros(1, 3))


@pytest.mark.parametrize("change", [
    dict(states=torch.zeros(0, 4, 3), mask=torch.ones(0, 4).bool()), dict(states=STATES.to(torch.float8_e4m3fn)),
    dict(states=STATES.double()), dict(null=torch.zeros(())), dict(mean=torch.zeros(3).to(torch.float8_e4m3fn)),
    dict(std=torch.ones(3).bool()), dict(std=torch.ones(3).to(torch.complex64)), dict(std=torch.ones(3).long()),
])  # fmt: skip
def test_odd_tensors_are_refused(change):
    sound = dict(states=STATES, mask=MASK, std=torch.ones(3)) | STATS
    assert conditions.load(sound).states is STATES and conditions.load_stats(sound).mean is STATS["mean"]
    with pytest.raises(UserError, match="odd shapes"):
        conditions.load(sound | change)
        conditions.load_stats(sound | change)
