"""`toto <verb>`; a command is imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback

from toto.runtime.errors import ConfigError, InterruptedRunError, StorageError, TotoError
from toto.runtime.files import UNWRITABLE

VERBS = {
    "demo": "everything below on the embedded sample, offline, in minutes",
    "doctor": "what is wrong with this data, and what tokenizing it will take",
    "tokenize": "images and videos -> shards of tokens",
    "shards": "look into stores of tokens, check, merge, split or export them",
    "plan": "parameters, FLOPs, memory, hours and storage of a run, before it is run",
    "train": "pre-train a model on shards, or continue",
    "evaluate": "image, video, bits or patches: what a checkpoint knows, as numbers",
    "finetune": "a classifier of a checkpoint and labelled files: probes beside next tokens, or in full",
    "predict": "what files show, by a fine-tuned classifier",
    "study": "several models pre-trained and read out alike, in one table",
    "generate": "continue a video, or dream one",
    "export": "a checkpoint as a Llama for transformers, or back; onto the hub",
    "tokenizer": "train or inspect a tokenizer",
}
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 failed, 2 misused, 130 interrupted with everything saved."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("toto: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            sys.stderr.write(f"{_self()}: {_one_line(error)}\n")
        if isinstance(error, InterruptedRunError):
            return INTERRUPTED
        return MISUSED if isinstance(error, ConfigError) else FAILED


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] in ("-V", "--version"):
        from toto.runtime.version import __version__

        print(f"toto {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise ConfigError("no such verb", where=verb, fix=f"verbs: {', '.join(VERBS)}")
    found = importlib.import_module(f"toto.commands.{verb}").run(rest)
    return FAILED if found else 0


def _usage() -> str:
    lines = [f"  toto {verb:<11}{what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "Toto learns from videos by predicting the next visual token.",
            "",
            *lines,
            "",
            "`toto <verb> --help` tells more.",
        ]
    )


def _self() -> str:
    """Who speaks: in a job of several processes, which of them."""
    from toto.runtime.ranks import rank_name

    return f"toto ({rank_name()})" if rank_name() else "toto"


def _one_line(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, TotoError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        if error.errno in UNWRITABLE and error.errno not in (errno.EACCES, errno.EPERM):  # those may be about reading
            what, fix = UNWRITABLE[error.errno]
            return str(StorageError(f"can't be written: {what}", where=error.filename or "a file", fix=fix))
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror.lower()}; check the path, its permissions and the disk"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller batch, size or model"
    text = " ".join(str(error).split())[:300]
    return f"unexpected {type(error).__name__}: {text}; run it again with --debug and report what it shows"


if __name__ == "__main__":
    raise SystemExit(main())
