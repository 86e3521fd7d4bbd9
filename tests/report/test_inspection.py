"""The page about tokenizers: it holds everything it shows, and its figures are those it was given."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from toto.report.inspection import (
    ERROR_FACTOR,
    Accounts,
    Inspected,
    Part,
    collapse_warnings,
    error_maps,
    rank_frequency,
    side_by_side,
    write_inspection_page,
)
from toto.tokens.quality import Fidelity
from toto.tokens.statistics import CodeCounter

FIDELITY = Fidelity(frames=6, psnr_db=25.438, psnr_of_mean_error_db=24.98, ssim=0.7291)


def made(name: str, *, vocabulary: int, side: int = 4, fidelity: Fidelity | None = FIDELITY, still: bool = False):
    codes = torch.randint(0, vocabulary, (6, side, side), generator=torch.Generator().manual_seed(vocabulary))
    counter = CodeCounter(vocabulary)
    for item in (codes[:1].expand(6, -1, -1),) if still else codes.split(3):
        counter.add(item)
    shown = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    return Inspected(tokenizer=name, fidelity=fidelity, codes=counter.statistics(), shown=shown)


@pytest.fixture
def part() -> Part:
    accounts = Accounts(
        read=2, failed=1, skipped=0, beyond_limit=0, frames=6, frames_available=6, items_cut=0, unusable=()
    )
    return Part(
        name="a <folder>",
        kind="media",
        size=(16, 16),
        accounts=accounts,
        originals=torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8),
        inspected=(made("first", vocabulary=64), made("sec<ond", vocabulary=4096, side=2)),
    )


def outside_references(page: str) -> list[str]:
    """What a browser would fetch: targets that are neither data nor places in the page itself."""
    targets = re.findall(r"(?:src|href|srcset|poster|data|action)\s*=\s*[\"']([^\"']*)", page)
    targets += re.findall(r"url\(\s*[\"']?([^\"')]*)", page)
    return [target for target in targets if not target.startswith(("data:", "#"))] + re.findall(r"@import|<link", page)


def test_the_page_stands_alone_and_shows_every_tokenizer(part, tmp_path):
    write_inspection_page(tmp_path / "index.html", [part], foot="made by `x`")
    page = (tmp_path / "index.html").read_text()
    assert outside_references(page) == []
    assert outside_references('<img src="http://a/b.png">') == ["http://a/b.png"]
    assert "sec&lt;ond" in page
    assert "a &lt;folder&gt;" in page
    assert "sec<ond" not in page
    assert len(re.findall(r"<figure>", page)) == 2
    assert len(re.findall(r"<svg", page)) == 3 + 2
    assert "1 inputs could not be read" in page
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_the_table_has_a_column_for_each_tokenizer_on_each_part(part):
    rows = {name: cells for name, *cells in side_by_side([part])}
    assert rows[""] == ["first", "sec<ond"]
    assert rows["codes a frame"] == ["4 x 4", "2 x 2"]
    assert rows["PSNR, dB"] == ["25.44", "25.44"]
    assert rows["SSIM"] == ["0.729", "0.729"]
    assert rows["codes in use"][0].endswith(" of 64 (80%)")
    assert rows["different 2-grams"][1].endswith(" of 18")
    other = replace(part, name="other")
    assert side_by_side([part, other])[0][1:] == tuple(
        f"{name}, {where}" for where in ("a <folder>", "other") for name in ("first", "sec<ond")
    )
    alone = replace(part, inspected=part.inspected[:1])
    assert side_by_side([alone, replace(alone, name="other")])[0] == ("", "a <folder>", "other")


def test_what_is_absent_has_no_row_or_a_dash(part, tmp_path):
    codes_only = replace(part, kind="shards", originals=None, inspected=(made("it", vocabulary=64, fidelity=None),))
    names = [row[0] for row in side_by_side([codes_only])]
    assert "SSIM" not in names
    assert not any("PSNR" in name for name in names)
    write_inspection_page(tmp_path / "p.html", [codes_only], foot="")
    assert "Decoded from the store" in (tmp_path / "p.html").read_text()
    small = replace(part, inspected=(made("it", vocabulary=64, fidelity=replace(FIDELITY, ssim=None)),))
    assert ("SSIM", "-") in side_by_side([small])


def test_frames_that_never_change_are_drawn(part, tmp_path):
    still = replace(part, inspected=(made("still", vocabulary=1, still=True),))
    write_inspection_page(tmp_path / "p.html", [still], foot="")
    assert ("repeats between frames", "100.0%") in side_by_side([still])
    assert "<svg" in rank_frequency(still, 3)


def test_collapse_is_told_with_a_remedy_where_there_are_tokens_enough(part):
    assert collapse_warnings([part]) == []  # the second has too few tokens to tell
    codes = part.inspected[0].codes
    collapsed = replace(part.inspected[0], codes=replace(codes, codes_used=19, share_used=19 / 64))
    (line,) = collapse_warnings([replace(part, inspected=(collapsed, part.inspected[1]))])
    assert line.startswith("first: only 19 of 64 codes occur (29.7%) in 96 tokens; ")
    assert "raise dead_below" in line
    assert "docs/tokenizer.md" in line
    few = replace(collapsed.codes, tokens=63, share_used=0.9)
    small = replace(part, name="small", inspected=(replace(collapsed, codes=few), part.inspected[1]))
    assert collapse_warnings([replace(part, inspected=(collapsed, part.inspected[1])), small]) == [line]
    better = replace(part, name="other")
    assert collapse_warnings([replace(part, inspected=(collapsed, part.inspected[1])), better]) == []


def test_error_maps_are_the_mean_absolute_error_in_colours():
    frames = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    others = frames.clone()
    others[0, 0, 0] = torch.tensor([3, 0, 0])
    others[0, 0, 1] = 255
    found = error_maps(frames, others)
    assert found.shape == frames.shape
    assert found.dtype == torch.uint8
    assert tuple(found[0, 1, 1].tolist()) == (0, 0, 4)  # magma's lower end
    assert tuple(found[0, 0, 1].tolist()) == (252, 253, 191)  # its upper end
    import matplotlib

    expected = [round(255 * level) for level in matplotlib.colormaps["magma"](ERROR_FACTOR)[:3]]
    assert found[0, 0, 0].tolist() == expected
    assert error_maps(others, frames).equal(found)


def test_accounts_say_how_many_of_how_many():
    whole = Accounts(
        read=2, failed=1, skipped=1, beyond_limit=0, frames=9, frames_available=9, items_cut=0, unusable=()
    )
    assert whole.offered == 4
    assert whole.in_words() == "looked at 9 of 9 frames of 2 items"
    cut = replace(whole, frames_available=None, items_cut=1, beyond_limit=1_000)
    assert (
        cut.in_words()
        == "looked at 9 frames of 2 items (1 of them have more, 1,000 items were left out: raise --frames)"
    )
