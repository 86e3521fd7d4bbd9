"""A share of the fault campaign: damaged media files end as a clip or as one kind of error, seeded."""

from __future__ import annotations

import hashlib
import warnings

import pytest
import torch
from fault_bombs import BOMBS, bomb
from fault_campaign import offer, tiny_tokenizer
from fault_mutations import BOMB_EVERY, MUTATIONS, mutated, mutation_of, numbers_in, write_mutated
from fault_originals import Original, make_originals, read_originals

from toto.media.catalog import list_source
from toto.media.decode import read_media
from toto.media.reading import stream_item
from toto.runtime.errors import MediaError

SHARE = range(200)


@pytest.fixture(scope="module")
def originals():
    return make_originals()


def test_every_original_can_be_read_and_is_the_same_again(originals, tmp_path):
    for one in originals:
        (tmp_path / one.name).write_bytes(one.content)
        clip = read_media(tmp_path / one.name)
        moving = one.name.startswith(("h264", "hevc", "fragments", "vp", "mpeg", "flv", "wmv", "moving"))
        assert (len(clip) > 1) == moving or one.ending == ".webp", one.name
    assert [one.content for one in make_originals()] == [one.content for one in originals]
    assert {one.name for one in read_originals(tmp_path)} == {one.name for one in originals}


def test_a_campaign_is_its_seed(originals, tmp_path):
    def digest(seed):
        files = (mutated(originals, seed, number) for number in SHARE if number % BOMB_EVERY != BOMB_EVERY // 2)
        return hashlib.sha256(b"".join(name.encode() + content for name, content in files)).hexdigest()

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)
    paths = write_mutated(tmp_path, originals, 0, range(1, 100))
    assert [path.name for path in paths] == [mutated(originals, 0, number)[0] for number in range(1, 100)]
    assert len({mutation_of(path.name) for path in paths}) > len(MUTATIONS) // 2


def test_declared_numbers_are_found_in_every_format(originals):
    for one in originals:
        found = list(numbers_in(one.content))
        assert found or one.name in ("h264.ts", "mpeg2.mpg", "flv.flv", "wmv.wmv"), one.name
        assert all(field.place < len(one.content) for field in found), one.name


def read(item):
    """How reading an item ends, with the frames or with what was said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "clip", [clip.frames for clip in stream_item(item, stride=4)]
    except MediaError as error:
        return "error", str(error)


def test_a_share_of_the_campaign_ends_as_clips_or_media_errors(originals, tmp_path):
    write_mutated(tmp_path, originals, 0, SHARE)
    ended = dict.fromkeys(("clip", "error"), 0)
    for item in list_source(tmp_path).items:
        if mutation_of(item.id) == "bomb":
            continue
        how, found = read(item)
        assert how == "clip" or mutation_of(item.id) != "untouched", found
        assert how == "error" or all(each.dtype == torch.uint8 for each in found)
        assert how == "clip" or "\n" not in found
        ended[how] += 1
    assert min(ended.values()) > 30


def test_what_else_codecs_raise_stays_inside(originals, tmp_path):
    """Pillow: IndexError, struct.error for GIFs cut behind their first picture, RuntimeError for AVIFs with holes."""
    named = {one.name: one.content for one in originals}
    gif, avif = named["moving.gif"], named["plain.avif"]
    second = gif.index(b"\x21\xf9\x04", gif.index(b"\x21\xf9\x04") + 1)
    for length in range(1, 14):
        (tmp_path / f"{length}.gif").write_bytes(gif[: second + length])
    for place in (100, 280, 460):
        (tmp_path / f"{place}.avif").write_bytes(avif[:place] + bytes(20) + avif[place + 20 :])
    catalog = list_source(tmp_path)
    assert len(catalog.items) == 16
    ended = {item.id: read(item)[0] for item in catalog.items}
    assert ended["280.avif"] == "error"


@pytest.mark.parametrize("name", ["beyond-the-limit", "far-beyond-the-limit"])
def test_bombs_are_refused_by_their_size(tmp_path, name, monkeypatch):
    monkeypatch.setitem(BOMBS, name, (*BOMBS[name][:2], "grey", 8))
    monkeypatch.setattr("fault_bombs._compressed", lambda row, height: iter([b"x"]))  # nobody gets that far
    (tmp_path / "b.png").write_bytes(bomb(name))
    with pytest.raises(MediaError, match="pixels"):
        read_media(tmp_path / "b.png")


def test_a_handful_goes_through_the_pipeline(originals, tmp_path):
    write_mutated(tmp_path / "files", originals, 0, range(40))
    report = offer(
        tmp_path / "files", tmp_path / "shards", tiny_tokenizer(tmp_path / "tokenizer"),
        limit=60, memory=2 * 10**9, workers=1,
    )  # fmt: skip
    assert report.wrong == []
    assert sum(sum(statuses.values()) for statuses in report.counts.values()) == 40
    assert report.worker_memory > 10**7


def test_the_campaign_notices_what_is_wrong(tmp_path, monkeypatch):
    whole = Original(name="a.bmp", content=b"")
    monkeypatch.setattr("fault_mutations.mutated", lambda *_: ("000001.untouched.a-bmp.bmp", whole.content))
    write_mutated(tmp_path / "files", [whole], 0, range(1, 2))
    report = offer(
        tmp_path / "files", tmp_path / "shards", tiny_tokenizer(tmp_path / "tokenizer"), limit=60, memory=1, workers=1
    )
    assert any("though nothing is wrong with it" in line for line in report.wrong)
    assert any("the bound is" in line for line in report.wrong)
