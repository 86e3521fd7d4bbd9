"""Sources at URLs: the same ids, labels and stores as from a local copy; networks that fail are not corrupt files."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from web_server import FolderServer, serve

from toto.media.catalog import Item, find_duplicates
from toto.media.catalogs import open_source
from toto.media.encode import write_image, write_video
from toto.media.reading import read_item
from toto.runtime import network
from toto.runtime.errors import ConfigError, MediaError, PlaceError
from toto.runtime.remote import RemotePath
from toto.tokens import extract
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.shards import read_ledger


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "WAITS", (0.0, 0.01))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of source, small."""
    root = tmp_path_factory.mktemp("made")
    dice = torch.Generator().manual_seed(0)

    def frames(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 48, 64, 3), dtype=torch.uint8, generator=dice)

    for name in ("tree/cats/a b.mp4", "tree/dogs/c.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, frames(40), rate=10)
    for number in range(3):
        write_image(root / f"tree/cats/{number}.png", frames(1)[0])
    (root / "tree/dogs/again.png").write_bytes((root / "tree/cats/0.png").read_bytes())
    (root / "tree/dogs/broken.png").write_bytes(b"nothing")
    (root / "tree/dogs/note.txt").write_text("no medium")
    (root / "list.tsv").write_text("tree/cats/a b.mp4\tcats\ntree/dogs/c.mp4\tdogs\ntree/none.mp4\tdogs\n")
    lines = [{"path": "tree/cats/a b.mp4", "start": n, "end": n + 2, "label": "x"} for n in range(2)]
    (root / "windows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "tars").mkdir()
    for number in range(3):
        with tarfile.open(root / f"tars/part-{number:03}.tar", "w") as tar:
            for name in ("cats/0.png", "cats/1.png", "dogs/c.mp4"):
                tar.add(root / "tree" / name, arcname=f"{number}/{name}")
                label = tarfile.TarInfo(f"{number}/{name[:-4]}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(str(number).encode()))
    with tarfile.open(root / "packed.tar.gz", "w:gz") as tar:
        tar.add(root / "tree/cats/1.png", arcname="1.png")
    rows = [{"image": {"bytes": (root / f"tree/cats/{n}.png").read_bytes(), "path": f"{n}.png"}, "label": n}
            for n in range(3)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
    return root


@pytest.fixture(params=["memory", "web"])
def elsewhere(request: pytest.FixtureRequest, made: Path) -> Iterator[str]:
    if request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}"
        for file in made.rglob("*"):
            if file.is_file():
                fsspec.filesystem("memory").pipe_file(f"{url}/{file.relative_to(made).as_posix()}", file.read_bytes())
        yield url
        return
    pytest.importorskip("aiohttp")
    with serve(made) as server:
        yield server.url


@pytest.fixture
def server(made: Path) -> Iterator[FolderServer]:
    pytest.importorskip("aiohttp")
    with serve(made) as running:
        yield running


SOURCES = ["tree", "list.tsv", "windows.jsonl", "tars", "tars/part-{000..001}.tar", "packed.tar.gz", "rows.parquet",
           "tree/cats/a b.mp4"]  # fmt: skip


def nameless(item: Item) -> Item:
    return replace(item, path=Path("somewhere"))


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_elsewhere_offers_what_a_local_copy_does(name: str, made: Path, elsewhere: str) -> None:
    local, far = open_source(str(made / name)), open_source(str(RemotePath(elsewhere) / name))
    assert [nameless(item) for item in far.items] == [nameless(item) for item in local.items]
    assert [item.size for item in far.items] == [item.size for item in local.items]
    reasons = [row.reason.replace(elsewhere, str(made)) for row in far.skipped]
    assert ([row.id for row in far.skipped], reasons) == (
        [r.id for r in local.skipped],
        [r.reason for r in local.skipped],
    )
    assert (far.form, far.classes) == (local.form, local.classes)
    assert find_duplicates(far.items) == find_duplicates(local.items)
    for near_item, far_item in zip(local.items, far.items, strict=True):
        if "broken" in near_item.id:
            continue
        near, read = read_item(near_item), read_item(far_item)
        assert torch.equal(near.frames, read.frames)
        assert torch.equal(near.timestamps, read.timestamps)


def test_a_list_on_the_disk_names_urls(made: Path, elsewhere: str, tmp_path: Path) -> None:
    root = RemotePath(elsewhere)
    names = [str(root / "tree/cats/a b.mp4"), str(root / "tree/none.mp4"), (made / "tree/dogs/c.mp4").as_uri()]
    (tmp_path / "list.tsv").write_text("".join(f"{name}\n" for name in names))
    catalog = open_source(f"list:{tmp_path / 'list.tsv'}")
    assert [item.id for item in catalog.items] == sorted([names[0], names[2]])
    assert [row.id for row in catalog.skipped] == [names[1]]


def test_clips_lie_at_a_url(made: Path, elsewhere: str, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("cats/a b.mp4\ndogs/c.mp4\n")
    (tmp_path / "ids.csv").write_text("video_id\nc\na b\n")
    clips = RemotePath(elsewhere) / "tree"
    for source in ("list.tsv", "ids.csv"):
        found = open_source(str(tmp_path / source), clips=clips)
        near = open_source(str(tmp_path / source), clips=made / "tree")
        assert [nameless(item) for item in found.items] == [nameless(item) for item in near.items]
        assert len(found.items) == 2


def test_listing_opens_no_medium(server: FolderServer) -> None:
    open_source(f"{server.url}/tree")
    assert {method for method, name, _ in server.requests if name.endswith((".mp4", ".png"))} == {"HEAD"}


@pytest.mark.parametrize("name", ["tree", "tars", "rows.parquet", "windows.jsonl"])
def test_stores_are_those_of_a_local_copy(name: str, made: Path, server: FolderServer, tmp_path: Path) -> None:
    config = TokenizeConfig(source=made / name, out=tmp_path / "near", size=32, min_frames=2, workers=0)
    tokenize(config)
    tokenize(replace(config, source=RemotePath(server.url) / name, out=tmp_path / "far"))
    for file in (tmp_path / "near").iterdir():
        if file.name != "made.json":
            assert (tmp_path / "far" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("name", "workers"), [("tree", 0), ("tars", 0), ("rows.parquet", 0), ("tree", 1)])
def test_a_network_that_fails_stops_the_run_which_continues(
    name: str, workers: int, made: Path, server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TokenizeConfig(
        source=RemotePath(server.url) / name, out=tmp_path / "far", size=32, min_frames=2, workers=workers
    )
    cut = extract.cut

    def cut_then_break(*words: object) -> object:
        server.broken, server.status = 10_000, 400 if workers else 503  # other processes would wait between attempts
        return cut(*words)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(extract, "cut", cut_then_break)
        with pytest.raises(PlaceError, match="400" if workers else "503"):
            tokenize(config)
    server.broken = 0
    tokenize(config)
    tokenize(replace(config, source=made / name, out=tmp_path / "near", workers=0))
    assert read_ledger(tmp_path / "far") == read_ledger(tmp_path / "near")


def test_what_is_gone_or_forbidden_is_a_missing_item(server: FolderServer, made: Path) -> None:
    items = {item.id: item for item in open_source(f"{server.url}/tree").items}
    server.forbidden = {"tree/cats/1.png"}
    with pytest.raises(MediaError, match=r"cats/1.png: missing: it may not be read"):
        read_item(items["cats/1.png"])
    gone = replace(items["cats/2.png"], path=RemotePath(f"{server.url}/tree/gone.png", size=10))
    with pytest.raises(MediaError, match=r"cats/2.png: missing: no such file"):
        read_item(gone)


def test_a_source_that_is_not_there_is_one_line(server: FolderServer) -> None:
    for url in (f"{server.url}/nothing", "memory://nothing/here", f"{server.url}/tars/part-{{007..009}}.tar"):
        with pytest.raises(ConfigError, match="no such file or folder; check the path"):
            open_source(url)
    with pytest.raises(ConfigError, match=r"part-003.tar: no such file; check the range in braces"):
        open_source(f"{server.url}/tars/part-{{000..004}}.tar")
    server.down = True
    with pytest.raises(PlaceError, match="can't be reached"):
        open_source(f"{server.url}/tree")


def test_nothing_stays_on_the_disk(server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTO_SCRATCH_OF_RUN", str(tmp_path))
    for item in open_source(f"{server.url}/tree").items:
        if "broken" not in item.id:
            read_item(item)
        assert len(list(tmp_path.iterdir())) <= 1
