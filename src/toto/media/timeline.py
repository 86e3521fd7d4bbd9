"""When every frame of a video is shown, and where decoding can begin: read from its packets, without decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import Float64, Int64

from toto.media.video import Video, open_video
from toto.runtime.errors import MediaError

# Of these a packet is a frame, and what is shown from a key frame on needs nothing before it. In VP8, for one, packets
# may show nothing, so that their number isn't the frames'.
RESUMABLE = frozenset(["h264", "hevc", "av1", "libdav1d", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "mjpeg"])
UNKNOWN = -(2**62)  # when the first packets are decoded isn't always said; nothing seeks there


class UntrustedSeekError(Exception):
    """What was decoded after a seek isn't what the packets promise."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames of a video in the order they are shown.

    Attributes:
        pts: when each is shown, in the stream's units, rising.
        dts: when each is decoded, likewise.
        whens: when each is shown, in seconds.
        keys: numbers of the frames that decoding can begin with.
    """

    pts: Int64[np.ndarray, " N"]
    dts: Int64[np.ndarray, " N"]
    whens: Float64[np.ndarray, " N"]
    keys: Int64[np.ndarray, " K"]

    def first_at(self, when: float) -> int:
        """The number of the first frame that is shown at `when` or later; N where there is none."""
        return int(np.searchsorted(self.whens, when, side="left"))

    def key_before(self, index: int) -> int:
        """The last frame up to `index` that decoding can begin with."""
        return int(self.keys[np.searchsorted(self.keys, min(index, len(self.pts) - 1), side="right") - 1])


def read_timeline(path: Path, until: float | None) -> Timeline | None:
    """The frames that are decoded before `until` seconds (None: all); None where the packets can't be trusted.

    Trusted are packets of which each has its own time, none is damaged or hidden, and the first one is a key frame and
    shown first.
    """
    pts: list[int] = []
    dts: list[int] = []
    keys: list[bool] = []
    try:
        with open_video(path, str(path)) as video:
            if video.stream.codec_context.name not in RESUMABLE:
                return None
            for packet in video.container.demux(video.stream):
                if packet.size == 0 and packet.pts is None:
                    break
                if packet.pts is None or packet.is_corrupt or packet.is_discard:
                    return None
                pts.append(packet.pts)
                dts.append(UNKNOWN + len(dts) if packet.dts is None else packet.dts)
                keys.append(packet.is_keyframe)
                if until is not None and packet.dts is not None and video.seconds(packet.dts, 0) >= until:
                    break
            order = np.argsort(np.array(pts, dtype=np.int64), kind="stable")
            shown, decoded = np.array(pts, dtype=np.int64)[order], np.array(dts, dtype=np.int64)
            if not keys or not keys[0] or order[0] != 0 or (np.diff(shown) <= 0).any() or (np.diff(decoded) <= 0).any():
                return None
            return Timeline(
                pts=shown,
                dts=decoded[order],
                whens=np.array([video.seconds(each, 0) for each in shown.tolist()]),
                keys=np.flatnonzero(np.array(keys)[order]),
            )
    except MediaError:
        return None


def frames_from(video: Video, timeline: Timeline, key: int) -> Iterator[VideoFrame]:
    """The frames from a key frame on, as they are shown; those that are decoded after it but shown before are left out.

    Raises:
        UntrustedSeekError: the seek didn't lead there.
    """
    video.container.seek(int(timeline.dts[key]), stream=video.stream)
    first = int(timeline.pts[key])
    arrived = False
    for packet in video.container.demux(video.stream):
        arrived = arrived or (packet.pts == first and packet.is_keyframe)
        if not arrived and (packet.size == 0 or (packet.dts is not None and packet.dts > timeline.dts[key])):
            raise UntrustedSeekError
        if not arrived:
            continue
        for frame in packet.decode():
            if frame.pts is None or frame.pts >= first:
                yield frame
