"""Make the embedded media sample, `src/toto/media/sample`, from freely licensed film and photographs.

    pip install av==18.1.0 numpy pillow
    python tools/make_sample.py --film FILM.mp4 --photographs FOLDER --out src/toto/media/sample

The film is Big Buck Bunny as `resources/bbb.mp4` (14,315 frames, 1280x720, 24 per second). It is inside
docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip of the source distribution fetched by
`pip download --no-deps --no-binary :all: moviepy==2.2.1`.

FOLDER holds the packages the photographs come from, each unpacked into a directory of its name: the wheels of
scikit-image 0.26.0 and scikit-learn 1.9.1 (`pip download --no-deps`, then `unzip -d`), and the Debian packages
gcompris-qt-data 3.1-2, lomiri-wallpapers-16.04 20.04.0-2 and palapeli-data 4:22.12.3-1 (`apt-get download`, then
`dpkg -x`). Whose each is and under which terms stands in PHOTOGRAPHS.

Without --photographs only the clips are made, without --film only the photographs.
"""

import argparse
import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image

FILM_FRAMES = 14_315
FRAME_RATE = 24
SHORT_SIDE, LONG_SIDE = 128, 228  # 720x1280 to the nearest even width
CRF = 16
KEYFRAME_EVERY = 48

THUMB_ROWS, THUMB_COLUMNS = 36, 64
MIN_FRAMES = 64
TRIM = 2  # frames taken off both ends of a shot, against a neighbour blended into them

# Stretches of the film that are no clean picture of one shot, [first, past the last); each also ends a shot.
EXCLUDED = (
    (0, 52),  # fade in
    (486, 553),  # "... presents" over the picture
    (585, 810),  # the film's title, then a dissolve
    (7163, 7240),  # fade out, black, fade in
    (11051, 11105),  # fade out, black, fade in
    (11180, 11200),  # dissolve
    (11718, 13942),  # iris, end credits
    (14314, 14315),  # black
)

# Scenes kept out of training, by the frames they span. Each is a run of consecutive shots whose camera set-ups come
# back nowhere else in the film; `check_split` measures that.
HELDOUT_SCENES = (
    (285, 486),  # the bird on the blossoming branch
    (1531, 1666),  # the rabbit among the white blossoms
    (2394, 2494),  # behind the leaves
    (2831, 2901),  # the three rodents appear
    (4796, 5292),  # the trunk and the nuts
    (6713, 7163),  # the painted face, the meadow of trunks, the bow
    (7240, 7400),  # the rodents run home
    (11105, 11312),  # the meadow after the fight
)
NEAR_DUPLICATE = 20  # mean absolute difference of 8-bit thumbnails under which two frames count as one set-up

PHOTOGRAPH_SIDE, JPEG_QUALITY = 288, 90


@dataclass(frozen=True)
class Photograph:
    """Where a photograph is found, and whom it is owed to.

    `file` is a path under FOLDER; behind a "!" follows the end of a path inside a Qt resource file. The terms are those
    the packages state: docstrings (scikit-image), README.txt (scikit-learn), debian/copyright (lomiri), .desktop files
    (palapeli), README files inside the resource files (gcompris, whose debian/copyright speaks of older pictures).
    """

    name: str
    split: str
    file: str
    title: str
    author: str
    licence: str
    source: str


SKIMAGE = "scikit-image/skimage/data"
SKLEARN = "scikit-learn/sklearn/datasets/images"
LOMIRI = "lomiri-wallpapers-16.04/usr/share/backgrounds"
PALAPELI = "palapeli-data/usr/share/palapeli/collection"
GCOMPRIS = "gcompris-qt-data/usr/share/gcompris-qt/rcc"
COMMONS = "https://commons.wikimedia.org/wiki/File:"

# fmt: off
PHOTOGRAPHS = (
    Photograph("astronaut", "train", f"{SKIMAGE}/astronaut.png",
               "Eileen Collins", "NASA", "public domain", "https://flic.kr/p/r9qvLn"),
    Photograph("camera", "heldout", f"{SKIMAGE}/camera.png",
               "Man with a camera", "Lav Varshney", "CC0 1.0", "scikit-image, data.camera"),
    Photograph("cat", "heldout", f"{SKIMAGE}/chelsea.png",
               "Chelsea the cat", "Stefan van der Walt", "CC0 1.0", "scikit-image, data.chelsea"),
    Photograph("coffee", "train", f"{SKIMAGE}/coffee.png",
               "Coffee cup", "Rachel Michetti", "CC0 1.0", "scikit-image, data.coffee"),
    Photograph("coins", "train", f"{SKIMAGE}/coins.png",
               "Greek coins from Pompeii", "Brooklyn Museum", "no known copyright restrictions",
               "https://www.brooklynmuseum.org/opencollection/archives/image/51611"),
    Photograph("galaxies", "train", f"{SKIMAGE}/hubble_deep_field.jpg",
               "Hubble deep field", "NASA", "public domain", "scikit-image, data.hubble_deep_field"),
    Photograph("rocket", "train", f"{SKIMAGE}/rocket.jpg",
               "Falcon 9 with DSCOVR", "SpaceX", "public domain",
               "https://www.flickr.com/photos/spacexphotos/16511594820/"),
    Photograph("pavilion", "heldout", f"{SKLEARN}/china.jpg",
               "China", "danielbuechele", "CC BY 2.0", "https://www.flickr.com/photos/danielbuechele/6061409035/"),
    Photograph("dahlia", "train", f"{SKLEARN}/flower.jpg",
               "Flower", "vultilion", "CC BY 2.0", "https://www.flickr.com/photos/vultilion/6056698931/"),
    Photograph("brushes", "heldout", f"{LOMIRI}/Picture_1A_by_freespace.jpg",
               "Picture 1A", "Trevor (Freespace)", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("fig", "heldout", f"{LOMIRI}/Picture_0B_by_freespace.jpg",
               "Picture 0B", "Trevor (Freespace)", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("drum", "train", f"{LOMIRI}/Wine_by_Jakkub_Mede.jpg",
               "Wine", "Jakub Mede", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("autumn_hill", "train", f"{LOMIRI}/aitzgorri_by_Aitzol_Berasategi.jpg",
               "Aitzgorri", "Aitzol Berasategi", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("dogs", "train", f"{LOMIRI}/friends_by_Aitzol_Berasategi.jpg",
               "Friends", "Aitzol Berasategi", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("stream", "train", f"{LOMIRI}/life_by_Aitzol_Berasategi.jpg",
               "Life", "Aitzol Berasategi", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("mountains", "heldout", f"{LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg",
               "Picos de Europa", "Aitzol Berasategi", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("sunset", "train", f"{LOMIRI}/sunset_by_Aitzol_Berasategi.jpg",
               "Sunset", "Aitzol Berasategi", "CC BY 4.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("dandelion", "train", f"{LOMIRI}/seeding_by_Clements_Engelhardt.jpg",
               "Seeding", "Clemens Engelhardt", "CC0 1.0", "Debian lomiri-wallpapers-16.04"),
    Photograph("bridge_at_night", "train", f"{PALAPELI}/cincinnati-bridge.jpg",
               "Roebling Suspension Bridge", "Derek Jensen", "public domain",
               f"{COMMONS}Cincinnati-roebling-suspension-bridge.jpg"),
    Photograph("citrus", "train", f"{PALAPELI}/citrus-fruits.jpg",
               "Citrus fruits", "US Department of Agriculture", "public domain", f"{COMMONS}Citrus_fruits.jpg"),
    Photograph("honey_bee", "heldout", f"{PALAPELI}/european-honey-bee.jpg",
               "European honey bee", "John Severns", "public domain",
               f"{COMMONS}European_honey_bee_extracts_nectar.jpg"),
    Photograph("crocodile", "train", f"{GCOMPRIS}/explore_world_animals.rcc!animals/crocodile.webp",
               "Saltwater crocodile", "Djambalawa", "public domain",
               f"{COMMONS}Saltwater_Crocodile_on_a_river_bank_(cropped).jpg"),
    Photograph("koala", "train", f"{GCOMPRIS}/explore_world_animals.rcc!animals/koala.webp",
               "Koala, Perth Zoo", "BurningWell", "public domain", f"{COMMONS}Koala_Perth_Zoo.jpg"),
    Photograph("lemur", "train", f"{GCOMPRIS}/explore_world_animals.rcc!animals/lemur.webp",
               "Lemur", "Mathias Appel", "CC0 1.0", f"{COMMONS}Lemur_(37122852696).jpg"),
    Photograph("moose", "heldout", f"{GCOMPRIS}/explore_world_animals.rcc!animals/moose.webp",
               "Male moose", "Ryan Hagerty", "public domain", f"{COMMONS}Male_Moose.jpg"),
    Photograph("panda", "train", f"{GCOMPRIS}/explore_world_animals.rcc!animals/panda.webp",
               "Giant panda", "Jeff Kubina", "public domain", f"{COMMONS}Giant_Panda_2004-03-2.jpg"),
    Photograph("polar_bear", "train", f"{GCOMPRIS}/explore_world_animals.rcc!animals/polar_bear.webp",
               "Polar bear, Churchill", "unknown", "public domain",
               f"{COMMONS}Churchill_Wildlife_Management_Area_polar_bear30.JPG"),
    Photograph("scarlet_macaw", "train", f"{GCOMPRIS}/explore_world_animals.rcc!animals/scarlet_macaw.webp",
               "Scarlet macaw", "Dcoetzee", "CC0 1.0",
               f"{COMMONS}Scarlet_macaw_at_Cougar_Mountain_Zoological_Park.jpg"),
    Photograph("sheep", "train", f"{GCOMPRIS}/explore_farm_animals.rcc!animals/sheep.webp",
               "Sheep", "Rob Mitchell", "CC0 1.0", f"{COMMONS}Sheep_(33625876592).jpg"),
    Photograph("crab", "train", f"{GCOMPRIS}/erase.rcc!resource/crab.webp",
               "Sally Lightfoot crab", "Nosferattus", "CC0 1.0", f"{COMMONS}Sally_Lightfoot_Crab_2019.jpg"),
    Photograph("kingfisher", "train", f"{GCOMPRIS}/erase.rcc!resource/kingfisher.webp",
               "Kingfisher", "Frank-2.0", "CC0 1.0", f"{COMMONS}Eisvogel_kingfisher.jpg"),
    Photograph("red_panda", "train", f"{GCOMPRIS}/erase.rcc!resource/red_panda.webp",
               "Red panda", "Mathias Appel", "CC0 1.0", f"{COMMONS}Red_Panda_(30324056733).jpg"),
    Photograph("mariachi", "train", f"{GCOMPRIS}/explore_world_music.rcc!music/mexico.webp",
               "Mariachi", "Elidealista", "CC0 1.0", f"{COMMONS}Wikipedia_10_Guadalajara_-_Mariachi.jpg"),
    Photograph("aqueduct", "train", f"{GCOMPRIS}/explore_monuments.rcc!france/pontduGard.webp",
               "Pont du Gard", "Mimova", "public domain", f"{COMMONS}Pontdugard.jpg"),
    Photograph("gate_at_dusk", "train", f"{GCOMPRIS}/explore_monuments.rcc!germany/brandenburgGate.webp",
               "Brandenburg Gate", "Evans1551", "public domain", f"{COMMONS}Brandenburg_Gate_(summer_2005).JPG"),
    Photograph("great_wall", "train", f"{GCOMPRIS}/explore_monuments.rcc!wonders/greatWallofChina.webp",
               "Great Wall of China", "Nicolas Perrault III", "CC0 1.0", f"{COMMONS}Great_Wall_of_China_July_2006.JPG"),
    Photograph("wind_palace", "train", f"{GCOMPRIS}/explore_monuments.rcc!india/hawaMahal.webp",
               "Hawa Mahal, Jaipur", "Janwiki", "public domain", f"{COMMONS}Hawa_Mahal,_Jaipur,_India.jpg"),
)
# fmt: on

ATTRIBUTION = """# Attribution

Made by `tools/make_sample.py`. Every work here is its author's, under the licence named beside it, and was changed as
said.

## Film: `scenes/`

"Big Buck Bunny", (c) 2008 Blender Foundation, www.bigbuckbunny.org, licensed under Creative Commons Attribution 3.0
(CC BY 3.0, https://creativecommons.org/licenses/by/3.0/). Changed: cut into single shots, of which some were left out
(titles, credits, fades, short shots), scaled from 1280x720 to 228x128, sound removed, encoded again as H.264. A clip is
named for its shot's number in the film.

## Photographs: `photographs/`

Changed: scaled to a shorter side of 288 pixels and stored as JPEG; `crab`, `kingfisher` and `red_panda` had been
cropped and sharpened by the GCompris project before. "CC BY X.Y" is the Creative Commons Attribution licence at
https://creativecommons.org/licenses/by/X.Y/, "CC0 1.0" the dedication at
https://creativecommons.org/publicdomain/zero/1.0/. The photographs came from the packages scikit-image 0.26.0,
scikit-learn 1.9.1 and, in Debian 12, gcompris-qt-data, lomiri-wallpapers-16.04 and palapeli-data; the source is where
those found them.

| file | title | author | licence | source |
|---|---|---|---|---|
"""


def decode(film: Path) -> Iterator[VideoFrame]:
    with av.open(film) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def thumbnails(film: Path) -> np.ndarray:
    """Every frame of the film, uint8 [frames, THUMB_ROWS, THUMB_COLUMNS, 3]."""
    size = {"width": THUMB_COLUMNS, "height": THUMB_ROWS, "interpolation": Interpolation.AREA}
    thumbs = np.stack([frame.to_ndarray(format="rgb24", **size) for frame in decode(film)])
    if len(thumbs) != FILM_FRAMES:
        raise ValueError(f"{film} has {len(thumbs)} frames where the frame numbers here are for {FILM_FRAMES}")
    return thumbs


def hard_cuts(thumbs: np.ndarray) -> list[int]:
    """First frames of shots: a change that stands out against the three changes before it and the three after.

    A zoom or a fast hand makes one of the two sides busy, so a large change need stand out against the quieter only.
    """
    change = np.zeros(len(thumbs))
    for i in range(1, len(thumbs)):
        change[i] = np.abs(thumbs[i].astype(np.int16) - thumbs[i - 1]).mean()
    cuts = []
    for i in np.flatnonzero(change >= 20):
        before = change[max(1, i - 3) : i].max(initial=0)
        after = change[i + 1 : i + 4].max(initial=0)
        quiet, busy = sorted((before, after))
        alone = change[i] > 2 * (busy + 1)
        at_an_edge = change[i] > max(35, 4 * (quiet + 1), 1.15 * busy)
        if alone or at_an_edge:
            cuts.append(int(i))
    return cuts


def shots_of(thumbs: np.ndarray) -> dict[int, tuple[int, int]]:
    """Shot number in the film (from 1) to its frames [first, past the last), excluded stretches left out."""
    edges = {0, len(thumbs), *hard_cuts(thumbs), *(edge for stretch in EXCLUDED for edge in stretch)}
    edges = sorted(e for e in edges if not any(first < e < stop for first, stop in EXCLUDED))
    spans = [span for span in itertools.pairwise(edges) if span not in EXCLUDED]
    return dict(enumerate(spans, start=1))


def clips_of(shots: dict[int, tuple[int, int]]) -> dict[str, dict[int, tuple[int, int]]]:
    """The shots long enough, trimmed, by split."""
    clips: dict[str, dict[int, tuple[int, int]]] = {"train": {}, "heldout": {}}
    for number, (first, stop) in shots.items():
        inside = [first < scene_stop and stop > scene_first for scene_first, scene_stop in HELDOUT_SCENES]
        split = "heldout" if any(inside) else "train"
        if stop - first - 2 * TRIM >= MIN_FRAMES:
            clips[split][number] = (first + TRIM, stop - TRIM)
    return clips


def check_split(thumbs: np.ndarray, clips: dict[str, dict[int, tuple[int, int]]]) -> None:
    """Compare every held-out frame with every training frame; print each held-out clip's nearest, refuse duplicates."""
    small = thumbs.reshape(-1, THUMB_ROWS // 4, 4, THUMB_COLUMNS // 4, 4, 3).mean((2, 4), dtype=np.float32)
    small = small.reshape(len(small), -1)
    train = clips["train"].items()
    frames = np.concatenate([np.arange(*span) for _, span in train])
    shot_of_frame = np.concatenate([np.full(stop - first, number) for number, (first, stop) in train])
    nearest = []
    for number, (first, stop) in clips["heldout"].items():
        pairs = []
        for i in range(first, stop):
            distances = np.abs(small[frames] - small[i]).mean(1)
            j = int(distances.argmin())
            pairs.append((float(distances[j]), i, int(frames[j]), int(shot_of_frame[j])))
        nearest.append((*min(pairs), number))
    for distance, i, j, train_number, number in sorted(nearest):
        print(f"held-out shot {number:03d}: {distance:5.1f} (frame {i} against frame {j} of shot {train_number:03d})")
    if min(nearest)[0] < NEAR_DUPLICATE:
        raise ValueError("a held-out clip repeats a training frame: move its scene")


def open_clip(path: Path) -> tuple[av.container.OutputContainer, av.VideoStream]:
    container = av.open(path, "w", options={"fflags": "+bitexact", "movflags": "+faststart"})
    # One thread, and no macroblock tree: with B-frames it reads memory it never set, and the bytes differ between runs.
    x264 = "mbtree=0"
    options = {
        "preset": "veryslow",
        "crf": str(CRF),
        "threads": "1",
        "g": str(KEYFRAME_EVERY),
        "x264-params": x264,
    }
    stream = container.add_stream("libx264", rate=FRAME_RATE, options=options)
    stream.width, stream.height, stream.pix_fmt = LONG_SIDE, SHORT_SIDE, "yuv420p"
    context = stream.codec_context
    context.thread_count = 1
    context.color_range, context.colorspace, context.color_primaries, context.color_trc = (
        1,
        1,
        1,
        1,
    )  # BT.709, limited
    return container, stream


def write_clips(film: Path, clips: dict[str, dict[int, tuple[int, int]]], out: Path) -> None:
    spans = sorted(
        (span, out / "scenes" / split / f"{number:03d}.mp4") for split in clips for number, span in clips[split].items()
    )
    for split in clips:
        folder = out / "scenes" / split
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.mp4"):
            old.unlink()
    frames = enumerate(decode(film))
    for (first, stop), path in spans:
        container, stream = open_clip(path)
        with container:
            for i, frame in frames:
                if i >= first:
                    scaled = frame.reformat(
                        LONG_SIDE,
                        SHORT_SIDE,
                        "yuv420p",
                        Colorspace.ITU709,
                        Colorspace.ITU709,
                        Interpolation.AREA,
                    )
                    scaled.pts, scaled.time_base = i - first, Fraction(1, FRAME_RATE)
                    scaled.pict_type = 0  # the encoder chooses anew, not as the film did
                    container.mux(stream.encode(scaled))
                if i == stop - 1:
                    break
            container.mux(stream.encode())
    for split in clips:
        paths = sorted((out / "scenes" / split).glob("*.mp4"))
        count = sum(stop - first for first, stop in clips[split].values())
        print(f"{split}: {len(paths)} clips, {count} frames, {sum(p.stat().st_size for p in paths):,} bytes")


def qt_resources(blob: bytes) -> dict[str, bytes]:
    """The files of a Qt binary resource file (rcc, format 2 and later), by path."""
    magic, _, tree, data, names = struct.unpack_from(">4s4I", blob)
    if magic != b"qres":
        raise ValueError("no Qt resource file")
    entries: dict[str, bytes] = {}

    def visit(node: int, folder: tuple[str, ...]) -> None:
        at = tree + 22 * node
        name_at, flags = struct.unpack_from(">IH", blob, at)
        (length,) = struct.unpack_from(">H", blob, names + name_at)
        name = blob[names + name_at + 6 :][: 2 * length].decode("utf-16-be") if node else ""
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">2I", blob, at + 6)
            for child in range(first, first + count):
                visit(child, (*folder, name))
            return
        (start,) = struct.unpack_from(">I", blob, at + 10)
        (size,) = struct.unpack_from(">I", blob, data + start)
        content = blob[data + start + 4 :][:size]
        entries["/".join((*folder, name))] = zlib.decompress(content[4:]) if flags & 1 else content

    visit(0, ())
    return entries


def write_photographs(folder: Path, out: Path) -> None:
    for split in ("train", "heldout"):
        (out / "photographs" / split).mkdir(parents=True, exist_ok=True)
        for old in (out / "photographs" / split).glob("*.jpg"):
            old.unlink()
    total = 0
    for photograph in PHOTOGRAPHS:
        file, _, inside = photograph.file.partition("!")
        content = (folder / file).read_bytes()
        if inside:
            (content,) = (entry for path, entry in qt_resources(content).items() if path.endswith("/" + inside))
        image = Image.open(io.BytesIO(content)).convert("RGB")
        scale = PHOTOGRAPH_SIDE / min(image.size)
        if scale > 1:
            raise ValueError(f"{photograph.file} is only {image.size}")
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        path = out / "photographs" / photograph.split / f"{photograph.name}.jpg"
        image.save(path, quality=JPEG_QUALITY, optimize=True)
        total += path.stat().st_size
    print(f"photographs: {len(PHOTOGRAPHS)}, {total:,} bytes")


def write_attribution(out: Path) -> None:
    rows = [
        f"| `{p.split}/{p.name}.jpg` | {p.title} | {p.author} | {p.licence} | {p.source} |"
        for p in sorted(PHOTOGRAPHS, key=lambda p: (p.split, p.name))
    ]
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", type=Path)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.film:
        thumbs = thumbnails(args.film)
        clips = clips_of(shots_of(thumbs))
        check_split(thumbs, clips)
        write_clips(args.film, clips, args.out)
    if args.photographs:
        write_photographs(args.photographs, args.out)
    write_attribution(args.out)


if __name__ == "__main__":
    main()
