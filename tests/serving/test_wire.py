"""Bytes on the wire: what OpenPI's clients send is read, and what is broken is refused."""

import msgpack
import numpy as np
import pytest
import torch

from trl_stare.serving import pack, unpack

# What openpi_client.msgpack_numpy packs for {"x": np.array([[1, 2]], dtype=np.uint8)}, byte by byte: a map of one, its key "x",
# a map of four with keys and data as bin 8 (0xc4), `True` (0xc3), and the shape as an array of two (0x92).
OPENPI = (
    b"\x81\xa1x\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x02\x01\x02\xc4\x05dtype\xa3|u1\xc4\x05shape\x92\x01\x02"
)


def test_arrays_are_those_of_openpis_clients():
    assert pack({"x": np.array([[1, 2]], dtype=np.uint8)}) == OPENPI
    assert unpack(OPENPI)["x"].tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_tensors_come_back_as_equal_arrays(dtype, shape):
    tensor = torch.arange(float(np.prod(shape))).reshape(shape).to(dtype)
    array = unpack(pack({"rows": [tensor]}))["rows"][0]
    assert array.shape == shape and torch.equal(torch.from_numpy(array.copy()), tensor)


def test_numpy_scalars_are_numbers():
    assert unpack(pack({"seed": np.int64(7)})) == {"seed": 7}
    assert unpack(msgpack.packb({b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"})) == 0.5


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.array(["a"]), {1, 2}])
def test_nothing_else_is_sent(value):
    with pytest.raises(TypeError, match="plain values and arrays"):
        pack(value)


def array(**changes):
    fields = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2]} | changes
    return msgpack.packb({name.encode(): value for name, value in fields.items()})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes that are not"),
        (b"\xc1", "1 bytes"),  # a byte that msgpack never uses
        (OPENPI[:-1], "incomplete"),
        (OPENPI + b"\0", "extra data"),
        (b"\x91" * 2000, "2000 bytes"),  # nested too deeply
        (b"\xdf\xff\xff\xff\xff", "5 bytes"),  # promises 2^32 - 1 entries
        (b"\xdd" + (300_000).to_bytes(4, "big") + b"\x80" * 300_000, "300005 bytes"),  # a list of as many empty maps
        (b"\xdc\xff\xff" * 4 + b"\x80" * 65_535 * 4, "at most 200000 objects"),  # lists within lists
        (b"\x81\x90\x01", "1|unhashable|not allowed"),  # a list as key
        (array(dtype="|O"), r"must be of \|u1.*got '\|O'"),
        (array(dtype=["<f4"]), r"got \['<f4'\]"),
        (array(shape=[3]), r"shape \[3\] and type <f4 must have 12 bytes, got 8"),
        (array(shape=[-1]), r"list of sizes as its shape, got \[-1\]"),
        (array(shape=[True, 2]), "list of sizes"),
        (array(shape=2), "list of sizes"),
        (array(data="text"), "must have 8 bytes, got <class 'str'>"),
        (array(shape=[2**62, 2**62]), "must have"),
    ],
)
def test_what_is_broken_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        unpack(data)
