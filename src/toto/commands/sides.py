"""What a read-out learns from and what it is tested on, as the options of a command name them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from toto.evaluation.labelled import LabelledClips, catalog_clips, split_by_share
from toto.media.catalogs import takes_clips, takes_column
from toto.runtime.errors import ConfigError
from toto.runtime.places import AnyPath


@runtime_checkable
class Asked(Protocol):
    """The options that name data."""

    @property
    def data(self) -> str:
        """What is trained on."""

    @property
    def clips(self) -> AnyPath | None:
        """The folder that holds what a manifest names."""

    @property
    def split(self) -> str | None:
        """Train on this split alone."""

    @property
    def image_column(self) -> str | None:
        """The column with the bytes of images or videos."""

    @property
    def label_column(self) -> str | None:
        """The column with the labels."""

    @property
    def test(self) -> str | None:
        """Another source to test on."""

    @property
    def test_clips(self) -> AnyPath | None:
        """The same as `clips`, for it."""

    @property
    def test_split(self) -> str | None:
        """Test on this split."""

    @property
    def test_image_column(self) -> str | None:
        """The same as `image_column`, for `test`."""

    @property
    def test_label_column(self) -> str | None:
        """The same as `label_column`, for `test`."""

    @property
    def test_share(self) -> float:
        """What is held back where nothing else is named."""


def training_and_test(asked: Asked, *, frames: int, stride: int, seed: int) -> tuple[LabelledClips, LabelledClips]:
    """Labelled clips to train on and to test on: another source, another split, or a share of the data.

    Args:
        asked: which.
        frames: T of a video clip.
        stride: of its frames.
        seed: of the share that is held back.

    Raises:
        ConfigError: no split to test on, media of another kind there, or columns of nothing.
    """
    if asked.test is None and (asked.test_image_column or asked.test_label_column):
        where = "--test-image-column or --test-label-column"
        raise ConfigError("names no source of its own", where=where, fix="give --test")
    train = catalog_clips(
        asked.data,
        frames=frames,
        stride=stride,
        clips=asked.clips,
        split=asked.split,
        image_column=asked.image_column,
        label_column=asked.label_column,
    )
    if asked.test is None and asked.test_split is None:
        return split_by_share(train, asked.test_share, seed=seed)
    if asked.test is None and asked.split is None:
        raise ConfigError("would train on the split it tests on", where="--test-split", fix="name --split, too")
    source = asked.test or asked.data
    test = catalog_clips(
        source,
        frames=frames,
        stride=stride,
        clips=asked.test_clips or (asked.clips if takes_clips(source) else None),
        split=asked.test_split,
        image_column=asked.test_image_column or (asked.image_column if takes_column(source, "image_column") else None),
        label_column=asked.test_label_column or (asked.label_column if takes_column(source, "label_column") else None),
        classes=train.classes,
    )
    if test.modality != train.modality:
        raise ConfigError(f"holds {test.modality}s, {train.name} holds {train.modality}s", where=test.name)
    return train, test
