"""Sheets and pages: pixels where they belong, and nothing fetched from elsewhere."""

from __future__ import annotations

import torch

from toto.media.encode import write_image
from toto.report.page import Section, write_page
from toto.report.sheet import GAP, PROMPT, comparison_sheet, contact_sheet


def test_a_sheet_shows_every_frame_and_marks_the_prompt():
    frames = torch.randint(0, 256, (10, 6, 8, 3), dtype=torch.uint8)
    sheet = contact_sheet(frames, prompt=3, columns=4, scale=2)
    height, width = 12 + 2 * GAP, 16 + 2 * GAP
    assert sheet.shape == (3 * height, 4 * width, 3)
    for number, frame in enumerate(frames):
        top, left = number // 4 * height, number % 4 * width
        shown = sheet[top + GAP : top + GAP + 12, left + GAP : left + GAP + 16]
        assert shown[::2, ::2].equal(frame)
        border = (42, 120, 214) if number < 3 else (255, 255, 255)
        assert tuple(sheet[top, left].tolist()) == border
    assert PROMPT == (42, 120, 214)
    assert comparison_sheet(frames[:4], frames[4:8]).shape == (2 * (6 + 2 * GAP), 4 * (8 + 2 * GAP), 3)


def test_a_page_holds_its_pictures_and_escapes_its_words(tmp_path):
    write_image(tmp_path / "a.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    section = Section(
        title="a < b", text=("one & two",), plots=("<svg></svg>",), pictures=((tmp_path / "a.png", "black"),),
        table=(("", "x"), ("row", "1")),
    )  # fmt: skip
    write_page(tmp_path / "p.html", title="T", lead="L", facts={"n": "3"}, sections=[section], foot="made by `x`")
    page = (tmp_path / "p.html").read_text()
    assert "a &lt; b" in page
    assert "one &amp; two" in page
    assert "<svg></svg>" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
