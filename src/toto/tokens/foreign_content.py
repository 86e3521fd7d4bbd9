"""What described pickles of weights mean: the names they may use, their storages, tensors, state dicts and modules.

What tensors are made of is in `torch/_utils.py`. Nothing here trusts a number of the file: a storage has exactly the
bytes that the file has for it, and a tensor stays inside of its storage.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from io import BufferedReader
from typing import Final, TypeAlias, TypeGuard, final

import torch
from torch import Tensor

from toto.runtime.errors import CheckpointError
from toto.tokens.pickle_machine import Call, Pairs, Persistent, Reference, printable

MOST_ENTRIES: Final = 200_000  # of all modules together
MOST_LETTERS: Final = 500  # of a name
MOST_DIMENSIONS: Final = 64
MOST_REPEATED: Final = 2**24  # numbers of a tensor that shows a smaller storage several times

STORAGES: Final = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.UntypedStorage": torch.uint8,
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES: Final = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
    )
}
TENSORS: Final = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
PARAMETERS: Final = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
SIZE: Final = "torch.Size"
DICTIONARIES: Final = (
    "collections.OrderedDict",
    "collections.defaultdict",
    "builtins.dict",
    "__builtin__.dict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_PLAIN: Final = ("dict", "list", "set", "tuple", "int", "float", "str", "bytes", "object")
_LIGHTNING: Final = (
    "callbacks.model_checkpoint.ModelCheckpoint",
    "callbacks.early_stopping.EarlyStopping",
    "utilities.parsing.AttributeDict",
)
_NUMPY_ARRAYS: Final = ("scalar", "_reconstruct")

ALLOWED: Final = frozenset(
    (
        # what tensors are made of
        *TENSORS,
        *PARAMETERS,
        *STORAGES,
        *DTYPES,
        SIZE,
        "torch.device",
        # containers and plain values; Python 2 and 3 have two names for them
        *DICTIONARIES,
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _PLAIN),
        "copyreg._reconstructor",
        "copy_reg._reconstructor",
        "_codecs.encode",
        # modules of DALL-E's published encoder and decoder, and those that others of the kind hold
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.decoder.Decoder",
        "dall_e.decoder.DecoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.conv.Conv2d",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.normalization.GroupNorm",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.sparse.Embedding",
        "torch.nn.modules.upsampling.Upsample",
        # leftovers of training in the checkpoints of Lightning
        *(f"{package}.{name}" for package in ("pytorch_lightning", "lightning.pytorch") for name in _LIGHTNING),
        "argparse.Namespace",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY_ARRAYS),
        "numpy.dtype",
        "numpy.ndarray",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "typing.Any",
    )
)


Found: TypeAlias = tuple[dict[str, Tensor], tuple[str, ...]]  # weights, and keys that hold none


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes of the file: where they start, how many they are, and their checksum where the format has one."""

    start: int
    size: int
    checksum: int | None


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A storage as a pickle identifies it: the numbers `first` ... `first + length` of `count` under a key."""

    key: str
    dtype: torch.dtype
    count: int
    first: int
    length: int


def storage_of(identity: object) -> Storage | None:
    """Understand ("storage", type, key, location, count[, view]); the legacy format has the view, or None for it."""
    match identity:
        case ("storage", Reference() as kind, str() as key, _, int() as count, *rest):
            pass
        case _:
            return None
    dtype = STORAGES.get(kind.dotted)
    view = (key, 0, count) if not rest or rest[0] is None else rest[0]
    if dtype is None or len(rest) > 1 or not isinstance(view, tuple) or len(view) != 3:
        return None
    _, first, length = view
    if not (is_size(count) and is_size(first) and is_size(length)) or first + length > count:
        return None
    return Storage(key=key, dtype=dtype, count=count, first=first, length=length)


@final
class Storages:
    """The storages of a file, each read once, when it is first asked for."""

    def __init__(self, handle: BufferedReader, extents: dict[str, Extent]):
        self._handle, self._extents = handle, extents
        self._read: dict[str, Tensor] = {}

    def numbers(self, storage: Storage) -> Tensor:
        """The storage's numbers in a row."""
        extent = self._extents.get(storage.key)
        if extent is None or extent.size != storage.count * storage.dtype.itemsize:
            raise damaged(f"storage {printable(storage.key)} is missing or of another size")
        if storage.key not in self._read:
            self._read[storage.key] = self._bytes(extent, storage.key)
        return self._read[storage.key].view(storage.dtype)[storage.first : storage.first + storage.length]

    def _bytes(self, extent: Extent, key: str) -> Tensor:
        content = torch.empty(extent.size, dtype=torch.uint8)
        view = content.numpy().data
        self._handle.seek(extent.start)
        done = 0
        while done < extent.size and (count := self._handle.readinto(view[done:])):
            done += count
        if done < extent.size or (extent.checksum is not None and zlib.crc32(view) != extent.checksum):
            raise damaged(f"storage {printable(key)} is cut off or its checksum is wrong")
        return content


def _tensor(node: object, storages: Storages, name: str) -> Tensor | None:
    """The tensor that a call would rebuild, None where the call is no such call."""
    if _dotted_call(node) in PARAMETERS and isinstance(node, Call) and node.args:
        node = node.args[0]
    function = _dotted_call(node)
    if function not in TENSORS or not isinstance(node, Call):
        return None
    shown = f"tensor {printable(name)}"
    args = node.args
    storage = storage_of(args[0].identity) if args and isinstance(args[0], Persistent) else None
    if storage is None or len(args) < 4:
        raise damaged(f"{shown} has no storage")
    numbers = storages.numbers(storage)
    if function == TENSORS[2]:
        dtype = DTYPES.get(dotted(args[6])) if len(args) > 6 else None
        if dtype is None or numbers.nbytes % dtype.itemsize or storage.first:
            raise damaged(f"{shown} has an unknown type")
        numbers = numbers.view(torch.uint8).view(dtype)
        args = args[:6] + args[7:]
    if any(pairs_of(bits) != [] for bits in args[6:] if bits is not None):
        raise damaged(f"{shown} is marked as conjugate or negated")
    offset, sizes, strides = args[1], _sizes(args[2]), _sizes(args[3])
    if not is_size(offset) or sizes is None or strides is None or len(sizes) != len(strides):
        raise damaged(f"{shown} has no proper shape")
    count = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if count and (last >= len(numbers) or count > max(len(numbers), MOST_REPEATED)):
        raise damaged(f"{shown} reaches beyond its storage")
    if not count and math.prod(size for size in sizes if size) >= 2**63:
        raise damaged(f"{shown} has no proper shape")
    start = numbers.storage_offset() + offset if count else 0  # as_strided counts from the storage, not from the view
    return numbers.as_strided(sizes, strides, start)


def _sizes(node: object) -> tuple[int, ...] | None:
    if isinstance(node, Call) and _dotted_call(node) == SIZE and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple) or len(node) > MOST_DIMENSIONS or not all(map(is_size, node)):
        return None
    return node


# ---- state dicts and modules ----


def gather(value: object, storages: Storages) -> Found:
    """The weights that an object holds, and its other keys: a module's, those under `state_dict`, or its own."""
    if _tables(value) is not None:
        return _module_weights(value, storages), ()
    top = {_key(key): inner for key, inner in pairs_of(value) or []}
    if "state_dict" not in top:
        return _own(top, storages)
    weights, odd = _own({_key(key): node for key, node in pairs_of(top["state_dict"]) or []}, storages)
    return weights, (*(name for name in top if name != "state_dict"), *(f"state_dict.{name}" for name in odd))


def _own(top: dict[str, object], storages: Storages) -> Found:
    found = {name: _tensor(node, storages, name) for name, node in top.items()}
    weights = {name: tensor for name, tensor in found.items() if tensor is not None}
    return weights, tuple(name for name in found if name not in weights)


def _module_weights(module: object, storages: Storages) -> dict[str, Tensor]:
    """A module's state dict: parameters, lasting buffers, then the modules inside, as `Module.state_dict` goes."""
    weights: dict[str, Tensor] = {}
    waiting: list[tuple[str, object]] = [("", module)]
    left = MOST_ENTRIES  # a file can nest one module in itself, or twice in the next one, and so on
    while waiting:
        prefix, node = waiting.pop()
        tables, entries = _tables(node), len(pairs_of(node.state) or []) if isinstance(node, Call) else 0
        if tables is None:
            raise damaged(f"module {printable(prefix)} is no module")
        own = [*(pairs_of(tables["_parameters"]) or []), *(pairs_of(tables["_buffers"]) or [])]
        inside = pairs_of(tables["_modules"]) or []
        passing_items = _items(tables.get("_non_persistent_buffers_set"))
        left -= 1 + entries + len(own) + len(inside) + len(passing_items)
        if left < 0 or len(prefix) > MOST_LETTERS:
            raise damaged("its modules are too many or nested too deeply")
        passing = {item for item in passing_items if isinstance(item, str)}
        for key, node in own:
            name = f"{prefix}{_key(key)}"
            if node is None or _key(key) in passing:
                continue
            tensor = _tensor(node, storages, name)
            if tensor is None or name in weights:
                raise damaged(f"weight {printable(name)} is there twice or is no tensor")
            weights[name] = tensor
        waiting += [(f"{prefix}{_key(key)}.", node) for key, node in reversed(inside) if node is not None]
    return weights


def _tables(node: object) -> dict[str, object] | None:
    """The attributes of a module, None for what is no module."""
    pairs = pairs_of(node.state) if isinstance(node, Call) else None
    tables = {key: value for key, value in pairs or [] if isinstance(key, str)}
    return tables if tables.keys() >= {"_parameters", "_buffers", "_modules"} else None


def pairs_of(node: object) -> list[tuple[object, object]] | None:
    """Keys and values of a dictionary of whichever kind, None for what is none."""
    if isinstance(node, Pairs):
        return node.pairs
    if not isinstance(node, Call) or _dotted_call(node) not in DICTIONARIES:
        return None
    given: list[tuple[object, object]] = []
    for arg in node.args[:2]:  # OrderedDict([(key, value), ...]), dict({...}), defaultdict(factory, {...})
        if isinstance(arg, Pairs):
            given += arg.pairs
        elif isinstance(arg, list):
            if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in arg):
                raise damaged("a dictionary of what are no pairs")
            given += [(pair[0], pair[1]) for pair in arg]
    return given + node.pairs


def _items(node: object) -> list[object]:
    """What is in a set, as protocol 4 writes one and as earlier ones do."""
    items = node.args[0] if isinstance(node, Call) and node.args else node
    return items if isinstance(items, list) else []


def _key(key: object) -> str:
    if isinstance(key, str):
        return key
    return str(key) if is_size(key) else f"({dotted(key) or type(key).__name__.lower()})"


def dotted(node: object) -> str:
    """The name that a reference is, an empty text for anything else."""
    return node.dotted if isinstance(node, Reference) else ""


def _dotted_call(node: object) -> str:
    return dotted(node.function) if isinstance(node, Call) else ""


def is_size(value: object) -> TypeGuard[int]:
    """Whether this is a whole number as sizes and places in a file are."""
    return type(value) is int and 0 <= value < 2**63


def damaged(reason: str) -> CheckpointError:
    """The error about a malformed file; who knows the file adds its name."""
    return CheckpointError(f"is damaged or no weight file ({reason})", fix="get it again or check the path")
