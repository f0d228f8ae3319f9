"""What a user sees: no text, wherever it comes from, moves the cursor or hides what stands there."""

from __future__ import annotations

import pytest

from jobs.host.console import Console, printable

ODD = "a\x1b[2J\x1b]0;title\x07b\x9bc\rd\u202ee\u2028f\x00"
SHOWN = r"a\x1b[2J\x1b]0;title\x07b\x9bc\rd\u202ee\u2028f\x00"


def test_control_characters_are_shown_as_escape_sequences():
    assert printable(ODD) == SHOWN
    assert printable("\ud800") == r"\ud800"
    assert printable("line\n\tÅngström, 東京, 😀") == "line\n\tÅngström, 東京, 😀"


@pytest.mark.parametrize("way", ["line", "error", "table", "stage"])
def test_nothing_that_is_printed_has_control_characters(capsys, way):
    console = Console()
    if way == "table":
        console.table("title", ("version", "why"), [("1", f"one\n{ODD}")], text=("why",))
    elif way == "stage":
        with console.stage("train") as stage:
            stage.tell(ODD)
            stage.result = ODD
    else:
        getattr(console, way)(ODD)
    printed = "".join(capsys.readouterr())
    assert SHOWN in printed
    assert not set(ODD.replace("\n", "")) & set("\x1b\x07\x9b\r\u202e\u2028\x00") & set(printed)
