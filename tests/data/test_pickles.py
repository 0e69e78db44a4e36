"""The interpreter of pickles: data comes through exactly, anything else is refused unrun."""

import argparse
import collections
import datetime
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_files import shard_content, write_pickle

from blip3o_fast.data.diskarray import _GLOBALS, DiskArray, read_pickle
from blip3o_fast.data.legacy import read_published
from blip3o_fast.data.pickles import Extent, PickleError, _DataMachine

PROTOCOLS = (2, 3, 4, 5)


def read(tmp_path, data: bytes):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return read_pickle(path)


def dumped(value, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def whole(array: DiskArray) -> torch.Tensor:
    return array.rows(0, array.shape[0])


LARGEST = 1 << 60  # of the integers that are keys
KEYS = st.one_of(
    st.text(), st.integers(-LARGEST, LARGEST), st.floats(allow_nan=False), st.none(), st.booleans()
)
PLAIN = st.recursive(
    st.one_of(KEYS, st.integers(), st.text(st.characters(codec=None))),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(KEYS, inner),
    ),
    max_leaves=25,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS))
def test_plain_data_comes_through(tmp_path_factory, value, protocol):
    result = read(tmp_path_factory.mktemp("plain"), dumped(value, protocol))
    assert result == value and repr(result) == repr(value)


def test_shared_and_recursive_parts_stay_shared(tmp_path):
    part = ["a"]
    result = read(tmp_path, dumped({"x": part, "y": part, "z": [part] * 300}))
    assert result["x"] is result["y"] and all(item is result["x"] for item in result["z"])
    part.append(part)
    result = read(tmp_path, dumped(part))
    assert result[1] is result


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_are_places_in_the_file(tmp_path, protocol):
    content = {"small": b"abc", "large": bytes(range(256)) * 300, "array": bytearray(b"xyz")}
    content = content if protocol == 5 else {**content, "array": b"xyz"}
    result = read(tmp_path, dumped(content, protocol))
    data = (tmp_path / "x.pkl").read_bytes()
    for name, extent in result.items():
        assert isinstance(extent, Extent)
        assert data[extent.offset : extent.offset + extent.length] == content[name]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_tensors(tmp_path, dtype, protocol):
    x = torch.randn(4, 5, 6).to(dtype)
    views = {"whole": x, "cut": x[1:, 1:, ::2], "turned": x.transpose(0, 2), "one": x[2]}
    result = read(tmp_path, dumped(views, protocol))
    for name, view in views.items():
        assert result[name].shape == view.shape
        assert torch.equal(whole(result[name]), view)
        assert torch.equal(result[name].rows(1, 3), view[1:3])


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("code", ["<f4", "<f2", "<f8", ">f4", ">f2"])
def test_arrays(tmp_path, code, protocol):
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(code)
    arrays = {"C": x, "F": np.asfortranarray(x), "cut": x[1:, 1:], "strided": x[:, :, ::2]}
    result = read(tmp_path, dumped(arrays, protocol))
    for name, array in arrays.items():
        assert result[name].shape == array.shape
        assert np.array_equal(whole(result[name]).numpy(), array)
        assert np.array_equal(result[name].rows(1, 3).numpy(), array[1:3])


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_names_of_numpy_1(tmp_path, protocol):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    data = dumped({"x": x, "n": np.float64(2.5)}, protocol)
    # The same opcodes with the older, shorter module names.
    old = data
    for name in (b"multiarray", b"numeric"):
        new = b"numpy._core." + name
        short = b"numpy.core." + name
        old = old.replace(new + b"\n", short + b"\n")  # GLOBAL
        old = old.replace(bytes([len(new)]) + new, bytes([len(short)]) + short)  # STACK_GLOBAL
    if protocol >= 4:  # the frame's length is a hint that this reader skips
        assert b"numpy._core" not in old
    result = read(tmp_path, old)
    assert torch.equal(whole(result["x"]), torch.from_numpy(x)) and result["n"] == 2.5


def test_numpy_scalars_and_ordered_dicts(tmp_path):
    content = collections.OrderedDict(
        a=np.int64(-7), b=np.float32(0.5), c=np.bool_(True), d=np.str_("text"), e=np.uint8(200)
    )
    result = read(tmp_path, dumped(content))
    assert result == {"a": -7, "b": 0.5, "c": True, "d": "text", "e": 200}
    assert [type(value) for value in result.values()] == [int, float, bool, str, int]


# --- what is refused


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


class New:
    """Pickles as NEWOBJ_EX."""

    def __getnewargs_ex__(self):
        return (), {"a": 1}

    def __new__(cls, **_):
        return super().__new__(cls)


def nestings(payload):
    x = torch.ones(2, 3)
    return {
        "direct": payload,
        "in a caption": shard_content(2, captions=["a", payload]),
        "in the config": shard_content(2, config={"mode": {"deep": [(payload,)]}}),
        "as embeddings": shard_content(2, eva_blip3o_embeddings=payload),
        "in a list of embeddings": shard_content(2, eva_blip3o_embeddings=[x, payload]),
        "as a dict's key": {(1, payload): 2},
        "in an object array": np.array([payload], dtype=object),
        "in a call's arguments": Calls(torch._utils._rebuild_tensor_v2, payload, 0, (1,), (1,)),
        "in a tensor's hooks": Calls(
            torch._utils._rebuild_tensor_v2, x._typed_storage(), 0, (2, 3), (3, 1), False, payload
        ),
        "in a storage": Calls(torch.storage._load_from_bytes, legacy_storage(payload)),
        "as a storage": Calls(torch.storage._load_from_bytes, pickle.dumps(payload)),
        "as a dtype": Calls(np.dtype, payload),
        "in the state of an array": Stated(np.ones(2), payload),
    }


def legacy_storage(payload) -> bytes:
    """What ``torch.save`` wrote before its zip format, with a payload for the system's facts."""
    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, payload, None, []):
        pickle.dump(part, buffer, protocol=2)
    return buffer.getvalue()


class Stated:
    """An array whose state is a payload."""

    def __init__(self, array, payload):
        self.array, self.payload = array, payload

    def __reduce__(self):
        function, arguments, _ = np.ones(2).__reduce__()
        return function, arguments, self.payload


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("place", list(nestings(None)))
def test_a_payload_runs_nowhere_and_is_refused_where_it_matters(tmp_path, place, protocol):
    sentinel = tmp_path / "it ran"
    data = pickle.dumps(nestings(Calls(os.mkdir, str(sentinel)))[place], protocol=protocol)
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    if place == "in the config" and protocol > 2:  # which nobody needs
        assert read_published(path).eva.shape[0] == 2
    else:
        with pytest.raises(ValueError, match=r"^.*x\.pkl: "):
            read_published(path)
    assert not sentinel.exists()
    if place == "direct":  # the test's own payload is live
        pickle.loads(data)
        assert sentinel.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, getattr, print, subprocess.run, __import__, io.open, pickle.loads],
)
def test_no_function_is_called(tmp_path, function, protocol):
    with pytest.raises(PickleError, match="refused"):
        read(tmp_path, pickle.dumps(Calls(function, "a"), protocol=protocol))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [Plain(), Plain, {1}, frozenset([1]), 1j, range(3)])
def test_objects_of_any_class_are_refused(tmp_path, value, protocol):
    with pytest.raises(PickleError, match="refused"):
        read(tmp_path, pickle.dumps(value, protocol=protocol))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_with_keyword_arguments_are_refused(tmp_path, protocol):
    with pytest.raises(PickleError, match="refused"):
        read(tmp_path, pickle.dumps(New(), protocol=protocol))


def named(module: str, name: str, arguments: bytes = b")") -> bytes:
    """A pickle that calls ``module.name`` by STACK_GLOBAL and REDUCE."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + arguments + b"R."


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("torch.storage", "io.open"),
        ("torch", "load"),
        ("torch", "FloatStorage"),  # known inside of a storage, not outside
        ("numpy", "ndarray.tofile"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("collections", "OrderedDict.__init__"),
        ("collections", "Counter"),
        ("builtins", "dict"),
        ("__builtin__", "eval"),
        ("no.such.module", "anything"),
        ("", ""),
    ],
)
def test_names_are_compared_whole(tmp_path, module, name):
    with pytest.raises(PickleError, match=r"refused.*the name"):
        read(tmp_path, named(module, name))
    assert "no" not in sys.modules


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (named("numpy", "ndarray"), "a call of numpy.ndarray"),
        (b"\x80\x04K\x01)R.", "a call of 1"),
        (b"\x80\x04}}b.", "a state for dict"),
        (b"\x80\x04]}b.", "a state for list"),
        (b"\x80\x04]K\x01K\x02s.", "items for list"),
        (b"\x80\x02cnumpy\nndarray\n.", None),
        (b"\x80\x02K\x01Q.", "a persistent object"),
        (b"(ios\nsystem\n.", "opcode 0x69"),  # INST
        (b"\x80\x02(cos\nsystem\no.", "opcode 0x6f"),
        (b"\x80\x02(cnumpy\nndarray\no.", "opcode 0x6f"),  # OBJ
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "an object of Global"),  # NEWOBJ
        (b"\x80\x02\x82\x01.", "opcode 0x82"),  # EXT1
        (b"\x80\x05\x97.", "opcode 0x97"),  # NEXT_BUFFER
        (named("collections", "OrderedDict", b"]\x85"), "an OrderedDict with arguments"),
        (named("numpy", "dtype", text("O8") + b"\x85"), "a numpy dtype 'O8'"),
        (named("numpy", "dtype", text("V8") + b"\x85"), "a numpy dtype 'V8'"),
    ],
)
def test_opcodes_that_ask_for_more_than_data(tmp_path, data, message):
    if message is None:
        assert read(tmp_path, data) == ("numpy", "ndarray")
        return
    with pytest.raises(PickleError, match=f"x.pkl: refused: .*{message}"):
        read(tmp_path, data)


@pytest.mark.parametrize("data", [b"\x80\x04]K\x01\x93.", b"\x80\x04}K\x01a."])
def test_opcodes_for_other_objects_are_errors(tmp_path, data):
    """A name made of a list and a number; an item appended to a dict."""
    with pytest.raises(PickleError, match=r"x\.pkl: malformed pickle"):
        read(tmp_path, data)


def test_the_opcodes_are_exactly_these():
    """Each builds plain data, or goes through a method that this package replaced."""
    names = {op.name for op in pickletools.opcodes if ord(op.code) in _DataMachine.dispatch}
    assert names == {
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE"),
        *("NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
        *("NEWOBJ", "NEWOBJ_EX", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
    }


def test_the_table_of_names_is_exactly_this():
    """A name added here is a promise that its builder neither runs nor imports anything."""
    assert {".".join(name) for name in _GLOBALS} == {
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
        "collections.OrderedDict",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy._core.numeric._frombuffer",
    }


ODD = {
    "path": Path("a"),
    "object": Plain(),
    "class": Plain,
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "complex": 1j,
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "namespace": argparse.Namespace(lr=0.1, tags={"a"}),
    "date": datetime.datetime(2025, 1, 2),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2]),
    "objects": np.array(["a", None], dtype=object),
    "integers": torch.arange(3),
    "keys": {(1, 2): 3, "b": 4},
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", ODD)
def test_what_nobody_needs_does_not_refuse_the_file(tmp_path, kind, protocol):
    plain = shard_content(2, config={"include_cls": False})
    content = {**plain, "config": {"include_cls": False, "x": ODD[kind], "y": [ODD[kind]]}}
    path = write_pickle(tmp_path / "x.pkl", content, protocol)
    source = read_published(path)
    expected = read_published(write_pickle(tmp_path / "plain.pkl", plain, protocol))
    assert (source.records, source.has_cls) == (expected.records, False)
    assert torch.equal(source.eva.rows(0, 2), expected.eva.rows(0, 2))
    assert read_pickle(path)["config"].keys() == {"include_cls", "x", "y"}
    for field in ("captions", "eva_blip3o_embeddings"):
        write_pickle(path, {**plain, field: ODD[kind]}, protocol)
        with pytest.raises(ValueError, match=r"x\.pkl: "):
            read_published(path)


# --- what is damaged


def small_pickle() -> bytes:
    content = {"x": torch.ones(2, 3), "y": np.ones(3, np.float32), "z": ["caption", 1.5, None, -3]}
    return dumped(content)


def test_truncated_at_every_byte(tmp_path):
    data = small_pickle()
    for length in range(len(data)):
        with pytest.raises(PickleError, match=r"x\.pkl: "):
            read(tmp_path, data[:length])
    assert set(read(tmp_path, data)) == {"x", "y", "z"}


def test_damaged_bytes_give_data_or_a_named_error(tmp_path):
    data = small_pickle()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            read(tmp_path, bytes(damaged))
        except PickleError as error:
            assert str(error).startswith("x.pkl: ")
            refused += 1
    assert refused > 200


def test_random_opcodes_give_data_or_a_named_error(tmp_path):
    codes = [ord(op.code) for op in pickletools.opcodes] + [0, 1, 2, 255]
    rng = np.random.default_rng(1)
    for _ in range(600):
        try:
            read(tmp_path, b"\x80\x04" + bytes(rng.choice(codes, rng.integers(1, 40)).tolist()))
        except PickleError as error:
            assert str(error).startswith("x.pkl: ")


@pytest.mark.parametrize("code", [b"\x8e", b"\x96", b"\x8d"])
def test_a_length_that_lies_allocates_nothing(tmp_path, code):
    data = b"\x80\x05" + code + struct.pack("<Q", 1 << 60) + b"abc."
    with pytest.raises(PickleError, match=r"truncated: expected 1152921504606846976 bytes at 11"):
        read(tmp_path, data)


def test_tensors_that_reach_beyond_their_storage(tmp_path):
    storage = torch.ones(6)._typed_storage()
    for offset, size, stride in (
        (1, (2, 3), (3, 1)),
        (0, (2, 3), (4, 1)),
        (0, (2, 3), (0, 1, 1)),
        (0, (7,), (0,)),
        (-1, (2, 3), (3, 1)),
        (0, (2, -3), (3, 1)),
        (0, (1 << 62, 1 << 62), (1, 1)),
    ):
        call = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
        with pytest.raises(PickleError, match=r"more than its storage holds|malformed tensor"):
            read(tmp_path, dumped(call))


def test_arrays_that_do_not_fill_their_shape(tmp_path):
    data = dumped(np.ones((2, 3), np.float32), 5)
    at = data.index(b"K\x02K\x03")
    with pytest.raises(PickleError, match=r"\[2, 4\] of <f4: expected 32 bytes, got 24"):
        read(tmp_path, data[: at + 3] + b"\x04" + data[at + 4 :])


@pytest.mark.timeout(60)
def test_a_pickle_that_unfolds_for_ever_is_refused_at_once(tmp_path):
    """Forty tuples, each twice the one before: hashing or printing the last takes 2**40 steps."""
    bomb = b"\x80\x04)" + b"2\x86" * 40
    for ending in (
        b"\x94}h\x00N\x86R.",
        b")R.",
        b"2\x93.",
        text("numpy") + text("dtype") + b"\x93h\x00\x85R.",
    ):
        with pytest.raises(PickleError):
            read(tmp_path, bomb + ending)
    assert read(tmp_path, bomb + b"\x94}h\x00Ns.") == {}  # as a key of a dict, which is left out


def test_a_large_pickle_takes_little_memory(tmp_path):
    path = write_pickle(tmp_path / "large.pkl", {"x": np.zeros(64 << 20, np.uint8)}, 5)
    code = (
        "import sys, resource; from pathlib import Path\n"
        "from blip3o_fast.data.diskarray import read_pickle\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); read_pickle(Path(sys.argv[1])); print(peak() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 10  # KiB, of 64 MiB
