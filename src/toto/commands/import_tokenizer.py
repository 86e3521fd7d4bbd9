"""`toto tokenizer import --kind dvae --encoder F --decoder F --out DIR`: published weights in, nothing executed.

F is a file, an address (https://...) or a file on the hub (hf://user/name/file), each with an optional
`#sha256=HEX` that it must have. Pickles are read as descriptions; only tensors come out of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from toto.commands.parsing import parse
from toto.runtime.errors import CheckpointError, ConfigError, TotoError
from toto.runtime.files import folder_written_aside, sha256_of
from toto.runtime.provenance import write_provenance
from toto.tokens import dvae, vqgan
from toto.tokens.fetch import local_copy
from toto.tokens.foreign import read_foreign
from toto.tokens.neural import Network, NeuralTokenizer, require_weights


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make a tokenizer folder of published weights: DALL-E's dVAE, or a VQGAN of taming-transformers.

    Each FILE is a local file, an address (https://...) or a file on the hub (hf://user/name/file), and may end in
    #sha256=HEX. It may hold safetensors, a state dict, a Lightning checkpoint or a whole pickled module. No pickle is
    executed.

    Attributes:
        kind: dvae (needs --encoder and --decoder) or vqgan (needs --checkpoint and --config).
        out: the tokenizer's folder.
        encoder: FILE of the dVAE's encoder, published as encoder.pkl.
        decoder: FILE of the dVAE's decoder, published as decoder.pkl.
        checkpoint: FILE of the VQGAN, published as last.ckpt.
        config: FILE of the VQGAN's configuration, published as model.yaml.
    """

    kind: Literal["dvae", "vqgan"]
    out: Path
    encoder: str | None = None
    decoder: str | None = None
    checkpoint: str | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Weights with the names toto has, and what they came from."""

    tokenizer: type[NeuralTokenizer]
    architecture: Any
    weights: dict[str, Tensor]
    ignored: tuple[str, ...]


def run(words: list[str]) -> None:
    """Fetch, read, check, write, and say what was made."""
    options = parse(Options, words, verb="tokenizer import")
    names = ("encoder", "decoder") if options.kind == "dvae" else ("checkpoint", "config")
    places = {name: getattr(options, name) for name in names}
    surplus = [name for name in ("encoder", "decoder", "checkpoint", "config") if name not in names]
    if missing := [f"--{name}" for name, place in places.items() if place is None]:
        raise ConfigError(f"needs {' and '.join(missing)}", where=f"--kind {options.kind}")
    if odd := [f"--{name}" for name in surplus if getattr(options, name) is not None]:
        raise ConfigError(f"doesn't take {' and '.join(odd)}", where=f"--kind {options.kind}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError("is not empty", where=options.out, fix="choose another --out")
    with tempfile.TemporaryDirectory(prefix="toto-import-") as scratch:
        files = {name: local_copy(str(place), Path(scratch)) for name, place in places.items()}
        made = read_dvae(files) if options.kind == "dvae" else read_vqgan(files)
        hashes = {name: sha256_of(file) for name, file in files.items()}
        tokenizer = build(made, {"imported": {name: f"{places[name]}" for name in names}, "sha256": hashes})
    with folder_written_aside(options.out) as aside:
        tokenizer.save(aside)
        write_provenance(aside, options)
    for name, sha256 in hashes.items():
        print(f"{name}: SHA-256 {sha256}")
    if made.ignored:
        print(f"left out, not the tokenizer's: {', '.join(made.ignored)}")
    grid = f"one of {tokenizer.vocab_size:,} codes for {tokenizer.downsampling} x {tokenizer.downsampling} pixels"
    print(f"{options.out}: {options.kind}, {tokenizer.parameters / 1e6:.1f} M parameters, {grid}")


def read_dvae(files: dict[str, Path]) -> Imported:
    """DALL-E's dVAE from its two files."""
    encoder, decoder = (read_foreign(files[name]) for name in ("encoder", "decoder"))
    weights = dvae.from_published(encoder.weights, decoder.weights)
    where = f"{files['encoder']} and {files['decoder']}"
    try:
        architecture = dvae.config_of(weights)
    except (KeyError, IndexError, TotoError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"is no dVAE ({what})", where=where, fix="give encoder.pkl and decoder.pkl") from None
    return Imported(
        tokenizer=dvae.DVAETokenizer,
        architecture=architecture,
        weights=weights,
        ignored=(*encoder.ignored, *decoder.ignored),
    )


def read_vqgan(files: dict[str, Path]) -> Imported:
    """A VQGAN from its checkpoint and its YAML."""
    architecture = vqgan.published_config(files["config"])
    found = read_foreign(files["checkpoint"])
    weights, ignored = vqgan.from_published(found.weights)
    return Imported(
        tokenizer=vqgan.VQGANTokenizer,
        architecture=architecture,
        weights=weights,
        ignored=(*found.ignored, *counted(ignored)),
    )


def counted(names: Iterable[str]) -> list[str]:
    """Parameter names by their first two parts, with how many there are."""
    groups: dict[str, int] = {}
    for name in names:
        group = ".".join(name.split(".")[:2])
        groups[group] = groups.get(group, 0) + 1
    return [f"{group} ({number})" if number > 1 else group for group, number in groups.items()]


def build(made: Imported, trained: dict[str, Any]) -> NeuralTokenizer:
    """The tokenizer, once its weights have the names, shapes and finite numbers they should have."""
    model: Network = made.tokenizer.empty(made.architecture)
    require_weights(made.weights, model, where="weights", fix="give the files that belong together")
    model.load_state_dict({name: value.float() for name, value in made.weights.items()}, assign=True)
    return made.tokenizer.from_model(model, trained=trained)
