"""`toto export CHECKPOINT --to hf --out FOLDER`, and back with `--to toto`; `--push` puts it onto the hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from toto.commands.parsing import parse
from toto.evaluation.result import load_result
from toto.model.causal import CausalModel
from toto.model.hub import push_to_hub, require_hub_name
from toto.model.transformer import Transformer
from toto.model.weights import (
    CARD_FILE,
    Card,
    checkpoint_folder,
    load_card,
    load_llama,
    load_model,
    save_llama,
    save_model,
    weights_sha256,
)
from toto.report.model_card import Form, ModelFacts, data_of, model_card, recipe_of, require_of_model
from toto.runtime.errors import ConfigError
from toto.runtime.files import folder_written_aside, write_text
from toto.tokens.passport import Passport
from toto.tokens.sequence import sequence_vocabulary
from toto.tokens.tokenizer import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GB = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a checkpoint as a folder for others, or make a checkpoint of such a folder.

    Attributes:
        checkpoint: a checkpoint or run folder, a folder of a LlamaForCausalLM, or a hub id.
        to: hf is a LlamaForCausalLM, which transformers loads; toto is a checkpoint of toto's own. Both are
            loaded by toto.load_model.
        out: the folder that is made.
        push: put it onto the hub under this name, user/name.
        private: the repository on the hub is private.
        dtype: of the weights of a Llama; bf16 rounds them and is half as large.
        file_gb: at most so many gigabytes of weights in a file of a Llama.
        results: result records of this checkpoint for the model card.
        licence: for the model card, as the hub writes it, for example apache-2.0.
        tokenizer: of a Llama that was not made by toto, the tokenizer its ids are of: "embedded", or a folder.
        frame_size: likewise, height and width of its frames in pixels.
        frames: likewise, frames in a sequence.
        stride: likewise, of the frames of videos.
    """

    checkpoint: tyro.conf.Positional[str]
    to: Literal["hf", "toto"] = "hf"
    out: Path | None = None
    push: str | None = None
    private: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    file_gb: float = 5.0
    results: tuple[Path, ...] = ()
    licence: str | None = None
    tokenizer: str | None = None
    frame_size: int | None = None
    frames: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.out is None and self.push is None:
            raise ConfigError("nowhere to write to", where="toto export", fix="give --out FOLDER or --push user/name")
        if self.push is not None:
            require_hub_name(self.push)
        elif self.private:
            raise ConfigError("says nothing without --push", where="--private", fix="add --push user/name")
        if not self.file_gb > 0:
            raise ConfigError(f"must be positive, is {self.file_gb}", where="--file-gb")
        if self.to == "toto" and self.dtype != "fp32":
            raise ConfigError("a checkpoint of toto's own is in fp32", where="--dtype", fix="leave it out")
        stranger = ("tokenizer", "frame_size", "frames", "stride")
        given = [name for name in stranger if getattr(self, name) is not None]
        if given and len(given) < len(stranger):
            missing = ", ".join(f"--{name.replace('_', '-')}" for name in stranger if name not in given)
            raise ConfigError("doesn't tell enough", where=f"--{given[0].replace('_', '-')}", fix=f"add {missing}")
        for name in ("frame_size", "frames", "stride"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"--{name.replace('_', '-')}")


def run(words: list[str]) -> None:
    """Parse, write the folder, put it onto the hub where that is asked for, and print where it is."""
    options = parse(Options, words, verb="export")
    if options.out is not None:
        made = _write(options, options.out)
        print(f"{options.out}: {made}; toto.load_model takes it")
        if options.push is not None:
            print(push_to_hub(options.out, options.push, private=options.private))
    elif options.push is not None:
        with tempfile.TemporaryDirectory(prefix="toto-") as temporary:
            folder = Path(temporary) / "model"
            made = _write(options, folder)
            print(f"{push_to_hub(folder, options.push, private=options.private)}: {made}")


def _write(options: Options, out: Path) -> str:
    """Write the folder; returns what it holds, in words."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("is there already", where=out, fix="choose another --out")
    source = checkpoint_folder(options.checkpoint)
    card = load_card(source) if options.tokenizer is None else stranger_card(options, options.tokenizer)
    model = load_model(source) if options.tokenizer is None else load_stranger(source, card)
    facts = facts_of(options, source, out, model, card)
    with folder_written_aside(out) as aside:
        if options.to == "hf":
            save_llama(aside, model, card, dtype=DTYPES[options.dtype], most_bytes=max(1, int(options.file_gb * GB)))
        else:
            save_model(aside, model, card)
        write_text(aside / "README.md", model_card(facts))
        size = sum(path.stat().st_size for path in aside.glob("*.safetensors"))
    kind = "a LlamaForCausalLM" if options.to == "hf" else "a checkpoint"
    parameters = sum(weight.numel() for weight in model.parameters())
    return f"{kind}, {parameters / 1e6:.2f} M parameters in {options.dtype}, {size / 1e6:,.1f} MB"


def stranger_card(options: Options, tokenizer: str) -> Card:
    """The card of a Llama that toto did not make, by the tokenizer and the sequences that are named."""
    assert options.frame_size is not None and options.frames is not None and options.stride is not None  # noqa: PT018
    passport = load_tokenizer(tokenizer).at(options.frame_size, options.frame_size)
    assert passport.grid is not None
    rows, cols = passport.grid
    sequence = {"frames": options.frames, "rows": rows, "cols": cols, "stride": options.stride}
    return Card(passport=passport.to_dict(), sequence=sequence)


def load_stranger(folder: Path, card: Card) -> Transformer:
    """A Llama that toto did not make; refused where it has one, or ids of another number."""
    if (folder / CARD_FILE).exists():
        raise ConfigError("the folder names its own", where="--tokenizer", fix="leave it out, and what goes with it")
    model = load_llama(folder)
    needed = sequence_vocabulary(Passport.from_dict(card.passport, where="--tokenizer").vocab_size)
    if model.config.vocabulary != needed:
        raise ConfigError(
            f"has {model.config.vocabulary:,} ids, sequences of this tokenizer have {needed:,}",
            where=folder,
            fix="name the tokenizer it was trained with",
        )
    return model


def facts_of(options: Options, source: Path, out: Path, model: CausalModel, card: Card) -> ModelFacts:
    """What the model card tells."""
    sha256 = weights_sha256(source)
    results = [(path, load_result(path)) for path in options.results]
    require_of_model(results, sha256)
    form: Form = options.to
    return ModelFacts(
        name=options.push or out.name,
        form=form,
        config=model.config,
        card=card,
        data=data_of(source, card),
        recipe=recipe_of(source),
        results=tuple(result for _, result in results),
        sha256=sha256,
        dtype=options.dtype,
        licence=options.licence,
    )
