"""Foreign weight files: read as torch reads them, refused by name where they would do anything, loud where damaged."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import io
import os
import pickle
import pickletools
import random
import runpy
import struct
import subprocess
import sys
import tarfile
import types
import webbrowser
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from toto.runtime.errors import CheckpointError
from toto.tokens.foreign import read_foreign
from toto.tokens.foreign_content import ALLOWED, STORAGES
from toto.tokens.pickle_machine import _OPERATIONS

MAGIC = 0x1950A86A20F9469CFC6C
CONTAINERS = ("plain", "zip", "legacy", "tar")


# ---- files ----


def in_container(container: str, stream: bytes) -> bytes:
    """A file of a format whose main pickle is this stream."""
    if container == "plain":
        return stream
    file = io.BytesIO()
    if container == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", stream)
            archive.writestr("archive/byteorder", b"little")
    elif container == "legacy":
        system = {"protocol_version": 1001, "little_endian": True}
        file.write(b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, system)))
        file.write(stream + pickle.dumps([], 2))
    else:
        return tar(pickle=stream, storages=pickle.dumps(0, 2) + pickle.dumps([], 2), tensors=pickle.dumps(0, 2))
    return file.getvalue()


def tar(**members: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {"sys_info": pickle.dumps({}, 2), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def saved(value, *, legacy: bool = False, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy, **options)
    return file.getvalue()


def rezipped(content: bytes, change) -> bytes:
    """The same archive, with each entry's name and content as `change` gives it back."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            if entry := change(name, old.read(name)):
                new.writestr(*entry)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    def read_content(content: bytes):
        path = tmp_path / "weights"
        path.write_bytes(content)
        return read_foreign(path)

    return read_content


def refusal(read, content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(content)
    message = str(caught.value)
    assert "\n" not in message
    assert "weights: " in message
    return message


def short_string(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


# ---- what would execute ----


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args, **filling):
        self.made = (function, args, filling.get("state"), filling.get("items"), filling.get("pairs"))

    def __reduce__(self):
        return self.made


MARKER = "executed"
COMMAND = f"touch {MARKER}"
GADGETS = {
    f"{os.name}.system": Calls(os.system, COMMAND),
    "builtins.eval": Calls(eval, f"open({MARKER!r}, 'w')"),
    "builtins.exec": Calls(exec, f"open({MARKER!r}, 'w')"),
    "builtins.getattr": Calls(getattr, "", "upper"),
    "io.open": Calls(open, MARKER, "w"),
    "subprocess.Popen": Calls(subprocess.Popen, ["touch", MARKER]),
    "subprocess.check_output": Calls(subprocess.check_output, ["touch", MARKER]),
    "webbrowser.open": Calls(webbrowser.open, "file:///nowhere"),
    "importlib.import_module": Calls(importlib.import_module, "antigravity"),
    "runpy._run_code": Calls(runpy._run_code, f"open({MARKER!r}, 'w')", {}),
    "torch.storage._load_from_bytes": Calls(torch.storage._load_from_bytes, b""),
    "torch.hub.load": Calls(torch.hub.load, "nowhere/nothing", "model"),
}


class Storing(pickle.Pickler):
    """Gives a gadget as the identity of something persistent."""

    def persistent_id(self, value):
        return ("storage", GADGETS["builtins.eval"], "0", "cpu", 1) if value == "outside" else None


def persistent(protocol: int) -> bytes:
    file = io.BytesIO()
    Storing(file, protocol).dump(["outside"])
    return file.getvalue()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", GADGETS)
def test_gadgets_are_refused_by_name(read, tmp_path, monkeypatch, container, name):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        message = refusal(read, in_container(container, pickle.dumps(GADGETS[name], protocol)))
        assert f"refers to {name}," in message or f" (now {name})," in message
        assert "not on the allow-list; nothing was executed" in message
    assert not (tmp_path / MARKER).exists()


def nestings(gadget):
    tensor = torch.ones(2)
    shared = [gadget]
    return {
        "list": [[[gadget]]],
        "tuple": ((gadget,),),
        "dict value": {"a": {"b": gadget}},
        "extra key": {"state_dict": {}, "callbacks": {"x": [gadget]}},
        "twice": {"state_dict": shared, "again": shared},
        "arguments": Calls(collections.OrderedDict, [("key", gadget)]),
        "state": Calls(collections.OrderedDict, state={"hook": gadget}),
        "list items": Calls(list, items=iter([gadget])),
        "dict items": Calls(dict, pairs=iter([("key", gadget)])),
        "tensor": Calls(torch._utils._rebuild_tensor_v2, gadget, 0, (2,), (1,), False, {}),
        "hooks": Calls(torch._utils._rebuild_parameter, tensor.tolist(), True, gadget),
        "never called": [gadget.made[0]],
        "dict key": {gadget.made[0]: 1},
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("place", nestings(GADGETS["builtins.eval"]))
def test_gadgets_are_refused_wherever_they_are(read, tmp_path, monkeypatch, container, place):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        message = refusal(
            read, in_container(container, pickle.dumps(nestings(GADGETS["builtins.eval"])[place], protocol))
        )
        assert "refers to builtins.eval" in message or "refers to __builtin__.eval (now builtins.eval)" in message
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("container", CONTAINERS)
def test_gadgets_in_persistent_identities_are_refused(read, container):
    for protocol in range(1, 6):
        assert "eval" in refusal(read, in_container(container, persistent(protocol)))


STREAMS = {
    "stack, dotted class": (
        b"\x80\x04" + short_string("builtins") + short_string("object.__subclasses__") + b"\x93.",
        "builtins.object.__subclasses__",
    ),
    "stack, dotted torch": (b"\x80\x04" + short_string("torch") + short_string("os.system") + b"\x93.", "torch.os"),
    "stack, deeper": (
        b"\x80\x04" + short_string("torch") + short_string("_utils.os.system") + b"\x93.",
        "torch._utils.os.system",
    ),
    "stack, an allowed name split elsewhere": (
        b"\x80\x04" + short_string("torch") + short_string("nn.modules.conv.Conv2d") + b"\x93.",
        "torch.nn.modules.conv.Conv2d",
    ),
    "stack, from the memo": (
        b"\x80\x04" + short_string("nt") + b"\x940" + short_string("system") + b"\x940h\x00h\x01\x93.",
        "nt.system",
    ),
    "global": (b"cos\nsystem\n.", "os.system"),
    "global, memoised, then called": (b"cos\nsystem\nq\x070h\x07(S'x'\ntR.", "os.system"),
    "instance": (b"(S'x'\niposix\nsystem\n.", "posix.system"),
    "object by stack": (b"(cposix\nsystem\nS'x'\no.", "posix.system"),
    "new object with keywords": (b"\x80\x04cos\nsystem\n)}\x92.", "os.system"),
    "dropped": (b"cos\nsystem\n0N.", "os.system"),
    "before a mark that is dropped": (b"(cos\nsystem\n1N.", "os.system"),
    "behind an empty stack": (b"00tRbcos\nsystem\n.", "os.system"),
    "cut off": (b"cos\nsystem\n", "os.system"),
    "extension 1": (b"\x82\x07.", "extension code 7"),
    "extension 2": (b"\x83\x07\x01.", "extension code 263"),
    "extension 4": (b"\x84\x07\x00\x01\x00.", "extension code 65543"),
    "line noise in the name": (
        b"\x80\x04" + short_string("o\x1b[2Js") + short_string("x\ny") + b"\x93.",
        "o\\x1b[2Js.x",
    ),
    "several": (
        b"(cos\nsystem\ncnt\nsystem\ncos\nsystem\nccollections\nOrderedDict\nl.",
        "os.system, nt.system, which are",
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", STREAMS)
def test_hand_written_streams_are_refused_by_name(read, container, name):
    stream, refused = STREAMS[name]
    assert f"refers to {refused}" in refusal(read, in_container(container, stream))


def test_references_without_text_are_no_references(read):
    for stream in (b"\x80\x04NN\x93.", b"\x80\x04" + short_string("os") + b"K\x01\x93.", b"\x80\x04(l(l\x93."):
        assert "a reference whose name is no text" in refusal(read, stream)


def test_every_stream_of_a_legacy_file_is_looked_at(read):
    honest = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}, {}, [])]
    for place in range(1, 5):
        streams = [*honest[:place], b"cos\nsystem\n.", *honest[place + 1 :]]
        assert "os.system" in refusal(read, b"".join(streams))


def test_every_stream_of_a_tar_file_is_looked_at(read):
    gadget, none = b"cos\nsystem\n.", pickle.dumps(0, 2)
    storage = pickle.dumps(1, 2) + b"(S'1'\nS'cpu'\nctorch\nFloatStorage\nt." + struct.pack("<q4f", 4, 1, 2, 3, 4)
    tensor = pickle.dumps(2, 2) + pickle.dumps((1, 1, 1), 2) + struct.pack("<ii5q", 2, 0, 2, 2, 2, 1, 0)
    clean = {"pickle": pickle.dumps({}, 2), "storages": storage + pickle.dumps([], 2), "tensors": none}
    assert "save it again with a newer torch" in refusal(read, tar(**clean))
    for member, content in {
        "sys_info": gadget,
        "pickle": gadget,
        "storages": storage + gadget,
        "tensors": tensor + gadget,
        "other": gadget,
    }.items():
        assert "os.system" in refusal(read, tar(**{**clean, member: content}))


def test_the_list_holds_nothing_that_acts():
    assert STORAGES.keys() <= ALLOWED
    assert not any(word in name for name in ALLOWED for word in ("eval", "exec", "getattr", "import", "load", "open"))


def test_every_operation_of_pickle_is_known():
    assert {operation.name for operation in pickletools.opcodes} == _OPERATIONS.keys() | {"STOP"}


# ---- what is read ----


def odd_weights() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    weights = {str(dtype): torch.arange(-3, 5).to(dtype) for dtype in (torch.float64, torch.float32, torch.float16)}
    weights |= {
        str(dtype): torch.arange(8).to(dtype)
        for dtype in (torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    }
    return {
        **weights,
        "base": base,
        "view": base[4:16].view(3, 4),
        "transposed": base.view(4, 6).T,
        "strided": base.view(4, 6)[::2, 1::3],
        "expanded": torch.ones(1).expand(5, 3),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(3)),
    }


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert not found[name].requires_grad
        assert torch.equal(found[name], tensor.detach()), name


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_are_read_as_torch_reads_them(read, legacy, protocol):
    content = saved(odd_weights(), legacy=legacy, pickle_protocol=protocol)
    found = read(content)
    assert_same(found.weights, torch.load(io.BytesIO(content), weights_only=False))
    assert found.ignored == ()
    same = found.weights["view"].untyped_storage().data_ptr() == found.weights["base"].untyped_storage().data_ptr()
    assert same


def test_types_without_a_storage_of_their_own_are_read(read):
    weights = {"a": torch.arange(5).to(torch.uint16), "b": torch.arange(5.0).to(torch.float8_e4m3fn)}
    found = read(saved(weights)).weights
    assert torch.equal(found["a"], weights["a"])
    assert torch.equal(found["b"].float(), weights["b"].float())


def test_safetensors_are_read(read):
    weights = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.int16)}
    found = read(safetensors.torch.save(weights))
    assert torch.equal(found.weights["a"], weights["a"])
    assert torch.equal(found.weights["b"], weights["b"])
    assert "holds no weights" in refusal(read, safetensors.torch.save({}))


@pytest.mark.parametrize("legacy", [False, True])
def test_of_a_lightning_checkpoint_the_state_dict_is_read(read, monkeypatch, legacy):
    callback = fake_class(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    weights = nn.Conv2d(2, 3, 3).state_dict()
    checkpoint = {
        "epoch": 3,
        "global_step": 2**70,
        "pytorch-lightning_version": "1.0.8",
        "state_dict": weights,
        "callbacks": {callback: {"best": torch.tensor(0.5), "monitor": "val/rec_loss", "path": Path("runs")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3), "seen": {1, 2}}}}],
        "defaults": collections.defaultdict(list, {"a": [1]}),
    }
    found = read(saved(checkpoint, legacy=legacy))
    assert_same(found.weights, weights)
    assert found.ignored == tuple(key for key in checkpoint if key != "state_dict")


def test_storages_that_nobody_asks_for_are_not_read(read):
    content = saved({"state_dict": {"a": torch.ones(3)}, "optimizer_states": [torch.zeros(4)]})
    spoilt = rezipped(content, lambda name, data: None if name.endswith("data/1") else (name, data))
    assert_same(read(spoilt).weights, {"a": torch.ones(3)})


def fake_class(monkeypatch, module: str, name: str, *bases: type) -> type:
    """A class that pickles under a name of a package that is not installed."""
    made = type(name, bases, {"__module__": module})
    place = types.ModuleType(module)
    setattr(place, name, made)
    parts = module.split(".")
    for count in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    monkeypatch.setitem(sys.modules, module, place)
    return made


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_of_a_module_the_state_dict_is_read(read, monkeypatch, legacy, protocol):
    kind = fake_class(monkeypatch, "dall_e.encoder", "Encoder", nn.Module)
    module = kind()
    module.blocks = nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 4, 3, bias=False), act=nn.ReLU(), pool=nn.MaxPool2d(2), same=nn.Identity()
        )
    )
    module.up = nn.Upsample(scale_factor=2, mode="nearest")
    module.codes = nn.Embedding(5, 4)
    module.scale = nn.Parameter(torch.randn(2))
    module.register_buffer("mean", torch.randn(3))
    module.register_buffer("passing", torch.randn(3), persistent=False)
    module.twin = module.blocks.conv
    module.device, module.width = torch.device("cpu"), 8
    found = read(saved(module, legacy=legacy, pickle_protocol=protocol))
    assert_same(found.weights, module.state_dict())
    assert "passing" not in found.weights


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_the_modules_of_dalle_are_read(read, legacy):
    dall_e = pytest.importorskip("dall_e")
    for module in (
        dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512),
        dall_e.Decoder(n_hid=64, n_init=8, n_blk_per_group=1, vocab_size=512),
    ):
        assert_same(read(saved(module, legacy=legacy)).weights, module.state_dict())


# ---- what is damaged ----


def test_missing_files_and_folders_are_said(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match=r"no such file|can't be read"):
            read_foreign(path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"hello", b"{", b"\0" * 600, b"]" * 100])
def test_files_of_other_kinds_are_said(read, content):
    assert "is damaged or no weight file" in refusal(read, content)


@pytest.mark.parametrize("value", [{"epoch": 1, "lr": 0.1}, [1, 2], 3, None, {}, {"state_dict": 5}, {"model": {}}])
def test_files_without_weights_are_said(read, value):
    for content in (saved(value), saved(value, legacy=True), pickle.dumps(value)):
        message = refusal(read, content)
        assert "holds no weights" in message
        assert not isinstance(value, dict) or all(key in message for key in value if key != "state_dict")


def test_big_endian_files_are_refused(read):
    content = saved({"a": torch.ones(3)})
    spoilt = rezipped(content, lambda name, data: (name, b"big" if name.endswith("byteorder") else data))
    assert "big-endian" in refusal(read, spoilt)
    streams = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": False}, {}, [])]
    assert "big-endian" in refusal(read, b"".join(streams))


def test_archives_are_held_to_what_torch_writes(read):
    content = saved({"a": torch.ones(300)})
    same = {"a": torch.ones(300)}
    assert_same(read(rezipped(content, lambda name, data: (name, data))).weights, same)

    missing = rezipped(content, lambda name, data: None if "/data/" in name else (name, data))
    assert "missing" in refusal(read, missing)
    longer = rezipped(content, lambda name, data: (name, data + b"1234" if "/data/" in name else data))
    assert "of another size" in refusal(read, longer)
    program = rezipped(content, lambda name, data: (name.replace("version", "constants.pkl"), data))
    assert "TorchScript" in refusal(read, program)

    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10**6)
    assert "compressed" in refusal(read, squeezed.getvalue())

    place = content.index(struct.pack("<f", 1.0) * 300)
    assert "checksum" in refusal(read, content[:place] + b"\1" + content[place + 1 :])

    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("archive/data.pkl", b"}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", b"}.")
    assert "twice" in refusal(read, twice.getvalue())


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 4) -> bytes:
    number = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    return b"(" + short_string("storage") + f"ctorch\n{kind}\n".encode() + short_string(key) + b"N" + number + b"tQ"


def tensor_file(*, kind="FloatStorage", count=4, offset=0, sizes=(4,), strides=(1,), size=16) -> bytes:
    """A zip archive with one tensor whose numbers are free to lie."""
    shape = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, sizes, strides))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(kind, count=count) + shape + b"\x89}tR"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + short_string("a") + call + b"s.")
        archive.writestr("archive/data/0", bytes(size))
    return file.getvalue()


def test_tensors_stay_inside_of_their_storages(read):
    assert read(tensor_file()).weights["a"].tolist() == [0.0] * 4
    assert read(tensor_file(sizes=(2, 2), strides=(0, 3))).weights["a"].shape == (2, 2)
    assert read(tensor_file(sizes=(0, 2**40), strides=(2**40, 1), offset=2**50)).weights["a"].shape == (0, 2**40)
    for lie in (
        {"count": 5},
        {"count": -4},
        {"count": 2**62},
        {"count": 2**66},
        {"size": 15},
        {"size": 20},
        {"kind": "DoubleStorage"},
        {"offset": 1},
        {"offset": -1},
        {"offset": True},
        {"offset": None},
        {"sizes": (5,)},
        {"sizes": (-1,)},
        {"sizes": (2, 2)},
        {"sizes": [4]},
        {"sizes": (2.0,)},
        {"strides": (-1,)},
        {"strides": (2,)},
        {"sizes": (2**40,), "strides": (0,)},
        {"sizes": (2**40,) * 64, "strides": (0,) * 64},
        {"sizes": (0,) + (2**40,) * 3, "strides": (1,) * 4},
        {"sizes": (1,) * 65, "strides": (1,) * 65},
        {"sizes": (10**5000,)},
    ):
        assert "is damaged" in refusal(read, tensor_file(**lie)), lie


@pytest.mark.parametrize("declared", [3, 5, 2**40, 2**63])
def test_legacy_storages_have_the_size_that_their_tensors_say(read, declared):
    content = saved({"a": torch.ones(4)}, legacy=True)
    place = content.index(struct.pack("<q4f", 4, 1, 1, 1, 1))
    assert "of another size" in refusal(read, content[:place] + struct.pack("<Q", declared) + content[place + 8 :])


def test_legacy_storages_may_be_views(read):
    whole = pickle.dumps("x", 2)
    for first, length, fits in ((1, 3, True), (0, 5, False), (3, 2, False)):
        view = b"(" + short_string("v") + bytes([ord("K"), first, ord("K"), length]) + b"t"
        identity = (
            b"(" + short_string("storage") + b"ctorch\nFloatStorage\n" + short_string("0") + b"NK\x04" + view + b"tQ"
        )
        call = b"ctorch._utils\n_rebuild_tensor\n(" + identity + b"K\x00K\x03\x85K\x01\x85tR"
        streams = [pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True})]
        content = b"".join(streams) + b"\x80\x02}" + short_string("a") + call + b"s." + pickle.dumps(["0"], 2)
        content += struct.pack("<q4f", 4, 1, 2, 3, 4) + whole
        if fits:
            assert read(content).weights["a"].tolist() == [2, 3, 4]
        else:
            assert "is damaged" in refusal(read, content)


HOSTILE = {
    "list in itself": b"]q\x00h\x00a.",
    "dict in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    "deep tuples": b"N" + b"\x85" * 2_000 + b".",
    "deep lists": b"]" * 2_000 + b"a" * 1_999 + b".",
    "deep calls": b"ccollections\nOrderedDict\nq\x00)R" + b"h\x00)Rb" * 2_000 + b".",
    "deep states": b"ccollections\nOrderedDict\nq\x00" + b")Rh\x00" * 2_000 + b"0" + b"b" * 1_999 + b".",
    "marks": b"(" * 2_000 + b".",
    "no mark": b"Nt.",
    "far memo": b"Nr\xff\xff\xff\xff.",
    "negative memo": b"Np-1\n.",
    "memo without entry": b"h\x05.",
    "huge text": b"\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "huge bytes": b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"abc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**64 - 1) + b"N.",
    "huge number": b"I" + b"9" * 10_000 + b"\n.",
    "negative length": b"T\xff\xff\xff\xff.",
    "later protocol": b"\x80\x06N.",
    "outer buffer": b"\x80\x05\x97.",
    "odd items": b"}(Nu.",
    "state of a number": b"K\x01}b.",
    "key as a list": b"}]Ns.",
    "pairs that are none": b"ccollections\nOrderedDict\n]K\x01a\x85R.",
    "unknown operation": b"\xff.",
    "calls of a number": b"K\x01)R.",
    "bad utf-8": b"X\x02\x00\x00\x00\xff\xfe.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_streams_cost_nothing(read, name):
    refusal(read, HOSTILE[name])
    refusal(read, in_container("zip", HOSTILE[name]))


def test_modules_that_hold_each_other_end(read, monkeypatch):
    monkeypatch.setattr("toto.tokens.foreign_content.MOST_ENTRIES", 3000)
    # A module under itself, and forty modules that each hold the next one twice.
    table = b"}X\x0b\x00\x00\x00_parameters}sX\x08\x00\x00\x00_buffers}sX\x08\x00\x00\x00_modules"
    new = b"ctorch.nn.modules.container\nSequential\n)R"
    itself = new + b"q\x00" + table + b"}X\x01\x00\x00\x00ah\x00ssb."
    twice = new + table + b"}sb"
    for _ in range(40):
        twice = twice + b"q\x000" + new + table + b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00usb"
    for stream in (itself, twice + b"."):
        assert "too many or nested too deeply" in refusal(read, stream)


def test_streams_end(read, monkeypatch):
    monkeypatch.setattr("toto.tokens.pickle_machine.MOST_OPERATIONS", 1000)
    assert "more than 1000 operations" in refusal(read, b"N0" * 1000 + b"N.")


@functools.cache
def fuzzed() -> dict[str, bytes]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    return {
        "zip": saved(weights.state_dict()),
        "legacy": saved(weights.state_dict(), legacy=True),
        "safetensors": safetensors.torch.save(weights.state_dict()),
        "tar": in_container("tar", pickle.dumps(list(range(20)), 2)),
        "stream": zipfile.ZipFile(io.BytesIO(saved({"state_dict": weights.state_dict()}))).read("archive/data.pkl"),
    }


@pytest.mark.parametrize("kind", fuzzed())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damage_anywhere_is_loud_or_harmless(read, kind):
    content, numbers = fuzzed()[kind], random.Random(kind)
    for _ in range(80):
        spoilt = bytearray(content)
        if numbers.random() < 0.3:
            del spoilt[numbers.randrange(len(spoilt)) :]
        for place in numbers.choices(range(len(spoilt)), k=numbers.choice((0, 1, 2, 8))) if spoilt else ():
            spoilt[place] = numbers.choice((0, 1, 0x2E, 0x7F, 0x80, 0xFF, numbers.randrange(256)))
        if numbers.random() < 0.2:
            start = numbers.randrange(len(spoilt) + 1)
            del spoilt[start : start + numbers.randrange(16)]
        whole = in_container(numbers.choice(CONTAINERS), bytes(spoilt)) if kind == "stream" else bytes(spoilt)
        with contextlib.suppress(CheckpointError):
            assert read(whole).weights


def test_instances_of_protocol_0_are_understood(read):
    stream = pickle.dumps(nn.Sequential(nn.ReLU()), 0)
    assert b"_reconstructor" in stream
    assert "holds no weights" in refusal(read, stream)
