"""The front in characters: marks where their numbers are, in any width."""

import io

import pytest
import search_sample
from rich.console import Console

from martlet.report.terminal_front import Front


def printed(document: dict, width: int = 80, **axes: str) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(Front(document, **axes))
    return console.file.getvalue()  # type: ignore[attr-defined]


def chart(text: str) -> list[str]:
    return [line.partition("│")[2] for line in text.splitlines() if "│" in line]


def test_marks_stand_where_their_numbers_are():
    text = printed(search_sample.document())
    rows = chart(text)
    places = {mark: [(i, row.index(mark)) for i, row in enumerate(rows) if mark in row] for mark in "★■▲"}
    (winner,), (reference,), peers = places["★"], places["■"], places["▲"]
    assert winner[1] < peers[0][1] < peers[1][1] < reference[1]  # 6.4, 8.4, 11.0 and 14.2 ms
    assert winner[0] < peers[0][0] <= peers[1][0] <= reference[0]  # drops of 0.6, 0.3, 0.1 and 0
    assert "┄" * 20 in rows[6]  # the budget of 1 point, above the winner and under what drops 1.7
    assert "3 outside" in text
    assert text.index("int8, r = 8") < text.index("int8, r = 4") < text.index("int8, r = 0") < text.index("bf16")
    assert "int8, smooth" not in text


def test_other_axes_can_be_asked_for():
    text = printed(search_sample.document(), x="file_bytes", y="top1_pct")
    assert "file, MB; lower is better" in text
    assert "6.10 MB" in text
    with pytest.raises(KeyError):
        printed(search_sample.document(), x="speed")


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_it_fits(width):
    text = printed(search_sample.document(), width)
    assert max(map(len, text.splitlines())) <= width
    assert bool(chart(text)) is (width > 32)


def test_names_are_neither_markup_nor_control_sequences_and_simulated_is_said():
    document = search_sample.document()
    document["points"][4]["label"] = "[red]x[/red]\x1b[2J"
    document["points"][1]["simulated"] = True
    text = printed(document)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "NNCF int8 (simulated)" in " ".join(text.split())


def test_one_point_or_none_is_no_error():
    document = search_sample.document()
    document["points"] = document["points"][4:5]
    document["job"]["budget"] = {}
    assert "★" in "".join(chart(printed(document)))
    document["points"] = []
    assert chart(printed(document)) == []


def test_hypervolume_is_told_with_its_reference_and_whether_all_others_are_dominated():
    document = search_sample.document()
    told = " ".join(printed(document).split())
    assert "up to 1.10 points and 15.62 ms: found 9.50 points·ms, references and peers 6.25; 9.75 with both" in told
    document["hypervolume"]["together"] = 9.5
    assert "every reference and peer is dominated" in " ".join(printed(document).split())
    document["hypervolume"] = None  # nothing was measured on held-out images yet
    document["peers_left_out"] = {"NNCF int8": "it isn't installed"}
    assert "ypervolume" not in printed(document)
    assert "No point of NNCF int8: it isn't installed." in printed(document)
