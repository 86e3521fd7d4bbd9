"""Vision models of Hugging Face as backbones: ViT, ViT-MAE, DINOv2, VideoMAE and all that answer as they do.

A model of images sees each frame by itself; one of videos the clip. Features are the hidden states of the blocks,
before the final norm, of visual tokens in raster order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from jaxtyping import UInt8
from torch import Tensor

from toto.evaluation.backbones.preprocessor import FILES, Preprocessor, read_preprocessor
from toto.evaluation.features import Backbone, sha256_of_plain
from toto.model.hub import FAILURES, WEIGHTS
from toto.model.tensors import INDEX_FILE, WEIGHTS_FILE, tensors_sha256
from toto.runtime.device import Precision, autocast, pick_device
from toto.runtime.errors import CheckpointError, ConfigError
from toto.runtime.files import read_json

OverFrames = Literal["concatenate", "average"]
CONFIG_FILE: Final = "config.json"
OF_VIDEOS: Final = ("videomae",)
MOST_BESIDE: Final = 16  # class and register tokens
UNUSED: Final = ("pooler", "layernorm", "post_layernorm", "norm.", "fc_norm", "head", "embeddings.mask_token")


class HuggingFaceBackbone(Backbone):
    """A frozen vision model of transformers.

    Args:
        model: gives hidden states.
        preprocessor: of its pixels.
        name: as it was asked for.
        weights_sha256: of its weight file.
        frames: T of the clips that a model of images takes; one of videos has its own.
        over_frames: of a model of images: tokens of all frames one after the other, or the mean over frames.
        keep_class: keep what stands before the visual tokens (class, registers), of every frame.
        precision: auto, bf16 or fp32.
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Preprocessor,
        *,
        name: str,
        weights_sha256: str,
        frames: int | None = None,
        over_frames: OverFrames = "concatenate",
        keep_class: bool = False,
        precision: Precision = "auto",
    ):
        self.model, self.preprocessor = model.eval(), preprocessor
        self.name, self._weights, self.precision = name, weights_sha256, precision
        self.over_frames, self.keep_class = over_frames, keep_class
        config = model.config
        self.of_videos = config.model_type in OF_VIDEOS
        own = int(config.num_frames) if self.of_videos else 1
        if self.of_videos and frames not in (None, own):
            raise ConfigError(f"takes clips of {own} frames, not {frames}", where=name, fix="leave --frames out")
        self.frames, self.stride, self.frame_size = frames or own, 4, preprocessor.size
        patch = config.patch_size
        self.patch: tuple[int, ...] = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self.layers = tuple(range(int(config.num_hidden_layers) + 1))
        if self.of_videos and preprocessor.size != config.image_size:
            sizes = f"its preprocessor makes frames of {preprocessor.size} pixels, the model takes {config.image_size}"
            raise ConfigError(sizes, where=name, fix="use a model that fits its own preprocessor")
        taken = inspect.signature(model.forward).parameters
        self._extra = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in taken else {}
        self._takes_noise = "noise" in taken

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of its weight file."""
        return self._weights

    def width(self, layer: int) -> int:
        """The residual stream's, of every layer."""
        return int(self.model.config.hidden_size)

    def prepared_as(self) -> str:
        """The preprocessor, the configuration, and what becomes of frames and class tokens."""
        config = {key: value for key, value in self.model.config.to_diff_dict().items() if not key.startswith("_")}
        config.pop("transformers_version", None)
        known = dataclasses.asdict(self.preprocessor) | {"config": repr(sorted(config.items()))}
        return f"hf {sha256_of_plain(known)} {self.over_frames} class={self.keep_class}"

    def prepare(self, frames: UInt8[Tensor, "T H W 3"]) -> UInt8[Tensor, "T S S 3"]:
        """Resized and cropped as its preprocessor says."""
        return self.preprocessor.prepare(frames)

    @torch.inference_mode()
    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """One pass; `[B, T x patches, D]`, averaged over frames `[B, patches, D]`, of videos `[B, patches, D]`."""
        clips, count = frames.shape[:2]
        if self.of_videos and count != self.frames:
            raise ConfigError(f"takes clips of {self.frames} frames, not {count}", where=self.name, fix="give videos")
        pixels = self.preprocessor.normalise(frames.to(self.device))
        inputs = pixels if self.of_videos else pixels.flatten(0, 1)
        with autocast(self.precision, self.device):
            found = self.model(inputs, output_hidden_states=True, **self._extra, **self._order(inputs)).hidden_states
        if len(found) <= self.layers[-1]:
            raise ConfigError(
                f"gives {len(found)} hidden states", where=self.name, fix="use a plain vision transformer"
            )
        return {layer: self._visual(found[layer].float(), clips, count) for layer in self.layers}

    def _order(self, inputs: Tensor) -> dict[str, Tensor]:
        """For MAE, that hides nothing: the noise that its patches are sorted by, already in order."""
        if not self._takes_noise:
            return {}
        patches = self._patches()
        return {"noise": torch.arange(patches, device=self.device).expand(len(inputs), patches).float()}

    def _patches(self) -> int:
        rows, cols = (self.frame_size // side for side in self.patch)
        return rows * cols

    def _visual(self, states: Tensor, clips: int, count: int) -> Tensor:
        """`[B, tokens, D]` of the visual tokens, from what the model gives for each of its inputs."""
        visual = self._patches() * (self.frames // self.model.config.tubelet_size if self.of_videos else 1)
        beside = states.shape[1] - visual
        if states.ndim != 3 or not 0 <= beside <= MOST_BESIDE:
            what = f"its hidden states {tuple(states.shape)} are not those of {visual} patches"
            raise ConfigError(what, where=self.name, fix="use a plain vision transformer")
        states = states if self.keep_class else states[:, beside:]
        if self.of_videos:
            return states
        by_frame = states.reshape(clips, count, *states.shape[1:])
        return by_frame.mean(dim=1) if self.over_frames == "average" else by_frame.flatten(1, 2)


def open_huggingface(
    name: str,
    *,
    frames: int | None = None,
    over_frames: OverFrames = "concatenate",
    keep_class: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    seed: int | None = None,
) -> HuggingFaceBackbone:
    """Open a vision model by the name of its folder or on the hub; safetensors alone are read, no code of its.

    Args:
        name: a folder, or user/name.
        frames: T of the clips that a model of images takes; None is 1.
        over_frames: see `HuggingFaceBackbone`.
        keep_class: see there.
        device: auto, cpu, cuda, ...
        precision: of the matrix products.
        seed: draw the weights at random instead of reading them.

    Raises:
        ConfigError: transformers isn't installed, or the model is no vision transformer, or its pixels are unknown.
        CheckpointError: nothing there, or weights that don't fit.
    """
    transformers = _transformers()
    folder = _folder(name)
    plain = read_json(folder / CONFIG_FILE, what="model configuration")
    if not isinstance(plain, dict) or "model_type" not in plain:
        fix = "leave hf: out" if isinstance(plain, dict) and "architecture" in plain else "check the path"
        raise CheckpointError("no model of transformers", where=folder, fix=fix)
    preprocessor = read_preprocessor(folder)
    with _quiet(transformers):
        model = _model(transformers, folder, name, seed)
    weights = tensors_sha256(folder) if seed is None else f"drawn with seed {seed}"
    return HuggingFaceBackbone(
        model.to(pick_device(device)),
        preprocessor,
        name=f"hf:{name}" if seed is None else f"random:hf:{name}",
        weights_sha256=weights,
        frames=frames,
        over_frames=over_frames,
        keep_class=keep_class,
        precision=precision,
    )


def _model(transformers: Any, folder: Path, name: str, seed: int | None) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vision = getattr(config, "vision_config", config)
        if missing := [
            each for each in ("patch_size", "num_hidden_layers", "hidden_size") if not hasattr(vision, each)
        ]:
            what = f"a {config.model_type} model is no vision transformer (no {', '.join(missing)})"
            raise ConfigError(what, where=name, fix="use one, as ViT, MAE, DINOv2 or VideoMAE")
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return _vision(transformers.AutoModel.from_config(config))
        model, loading = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:  # what transformers raises on damaged folders has no common kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"can't be loaded ({reason})", where=name, fix="use a whole checkpoint") from None
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(UNUSED))
    if missing:
        what = f"{len(missing)} weights are missing ({', '.join(missing[:3])})"
        raise CheckpointError(what, where=name, fix="use a whole checkpoint")
    return _vision(model)


def _vision(model: Any) -> Any:
    """Of a model of pictures and texts the part that sees."""
    return getattr(model, "vision_model", model)


def _folder(name: str) -> Path:
    """The local folder of a model."""
    folder = Path(name)
    if not folder.exists():
        if len(folder.parts) > 2 or folder.is_absolute() or name.startswith("."):
            raise CheckpointError("no such folder", where=name, fix="check the path, or give a name of the hub")
        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, *FILES, *WEIGHTS]))
        except (*FAILURES, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"no such folder, and the hub can't give it ({reason})", where=name, fix="check the name or the network"
            ) from None
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"no {CONFIG_FILE} here", where=name, fix="give the folder of a model of transformers")
    if not (folder / WEIGHTS_FILE).exists() and not (folder / INDEX_FILE).exists():
        raise CheckpointError(f"no {WEIGHTS_FILE} here", where=name, fix="convert its weights to safetensors")
    return folder


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"needs {(error.name or 'transformers').partition('.')[0]}, which isn't installed",
            where="a Hugging Face model",
            fix="pip install 'toto-video[hf]'",
        ) from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without what transformers prints while it loads; what matters of it is raised."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
