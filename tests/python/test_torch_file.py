"""Hostile and damaged .pt files get one error: nothing is run, no memory is filled."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.torch_file import TorchFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FLOATS = np.arange(6, dtype=np.float32)
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def write(path: Path, pickled: bytes, compression=zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A file of torch.save around `pickled`, whose storage "0" holds FLOATS."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in ({"data/0": FLOATS.tobytes()} | records).items():
            archive.writestr(f"archive/{name}", data)
    return path


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(offset: int, shape: list[int], strides: list[int], storage: bytes = STORAGE) -> bytes:
    """Opcodes that make a tensor."""
    sizes, steps = (b"(" + b"".join(map(number, part)) + b"t" for part in (shape, strides))
    return REBUILD + b"(" + storage + number(offset) + sizes + steps + b"\x89}tR"


def program(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


def load(path: Path, pickled: bytes, **records: bytes):
    with TorchFile(write(path, pickled, **records)) as file:
        return file.content


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hostile.pt"


def test_strided_views_are_read(path):
    with TorchFile(write(path, program(tensor(1, [2, 2], [1, 3])))) as file:
        assert file.content.array().tolist() == [[1, 4], [2, 5]]
    with TorchFile(write(path, program(tensor(5, [0, 3], [3, 1])))) as file:
        assert file.content.array().shape == (0, 3)
    with TorchFile(write(path, program(tensor(3, [], [])))) as file:
        assert file.content.array() == 3.0


def test_bfloat16_is_widened(path):
    bits = struct.pack("<6H", 0x3F80, 0xBF80, 0x7F80, 0x0001, 0x4049, 0x0000)
    half = STORAGE.replace(b"FloatStorage", b"BFloat16Storage")
    with TorchFile(write(path, program(tensor(0, [6], [1], half)), **{"data/0": bits})) as file:
        values = file.content.array()
    assert values.dtype == np.float32
    assert values.tolist() == [1.0, -1.0, np.inf, np.float32(2.0**-133), 3.140625, 0.0]


class Hostile:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Hostile(os.system, "touch {marker}"), "posix.system"),
        (Hostile(eval, "open('{marker}', 'w')"), "__builtin__.eval"),
        (Hostile(exec, "open('{marker}', 'w')"), "__builtin__.exec"),
        (Hostile(getattr, os, "system"), "module"),
        (Hostile(Path, "/"), "pathlib"),
        (Hostile(io.BytesIO, b"x"), "_io.BytesIO"),
    ],
)
def test_code_is_named_and_never_run(path, tmp_path, value, name):
    marker = tmp_path / "marker"
    try:
        pickled = pickle.dumps({"module": value}, protocol=2)
    except TypeError:  # a module cannot be pickled: write the opcodes
        pickled = program(b"c__builtin__\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00x\x86R")
        name = "os.system"
    pickled = pickled.replace(b"{marker}", str(marker).encode())
    with pytest.raises(CheckpointError, match=name) as error:
        load(path, pickled)
    assert str(path) in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.storage._load_from_bytes",
        "torch.jit.load",
        "numpy.load",
        "deepspeedevil.Runner",
        "deepspeed",
        "collections.Counter",
        "transformers.TrainingArguments",
    ],
)
def test_names_outside_the_list_are_refused(path, name):
    module, _, last = name.rpartition(".")
    with pytest.raises(CheckpointError, match=f"'{module}\\.{last}'"):
        load(path, program(f"c{module}\n{last}\n)R".encode()))


def test_deepspeed_classes_only_hold_values(path):
    made = load(path, program(b"cdeepspeed.launcher.runner\nmain\n)R}X\x01\x00\x00\x00aK\x01sb"))
    assert (made.class_name, made.state) == ("deepspeed.launcher.runner.main", {"a": 1})


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (tensor(0, [7], [1]), "beyond its storage"),
        (tensor(1, [6], [1]), "beyond its storage"),
        (tensor(0, [2, 2], [1, 5]), "beyond its storage"),
        (tensor(0, [2**40], [0]), "beyond its storage"),
        (tensor(0, [2**62, 0], [1, 1]), "elements"),
        (tensor(-1, [2], [1]), "no natural number"),
        (tensor(0, [-2], [1]), "no natural number"),
        (tensor(0, [2], [-1]), "no natural number"),
        (tensor(0, [2, 2], [1]), "do not fit"),
        (tensor(0, [1] * 40, [1] * 40), "do not fit"),
        (tensor(0, [1], [1], b"K\x01"), "without a storage"),
        (tensor(0, [6], [1], STORAGE.replace(b"Float", b"Double")), "24 bytes"),
        (tensor(0, [6], [1], STORAGE.replace(b"K\x06", b"K\x07")), "24 bytes"),
        (tensor(0, [6], [1], STORAGE.replace(b"K\x06", b"N")), "24 bytes"),
        (tensor(0, [6], [1], STORAGE.replace(b"\x000X", b"\x001X")), "lacks the record"),
        (tensor(0, [6], [1], STORAGE.replace(b"ctorch\nFloatStorage\n", b"N")), "no storage"),
        (b"K\x01Q", "no storage"),
        (tensor(0, [6], [1]) + tensor(0, [3], [1], STORAGE.replace(b"Float", b"Int")) + b"\x86",
         "two types"),
        (b"(" * 100_000 + b"t" * 99_999, "no .* mark|operand|more than one"),
        (b"\x85" * 10, "misses its operand"),
        (b"K\x01K\x02", "more than one object"),
        (b"h\x05", "not there"),
        (b"r\xff\xff\xff\xff", "operand"),
        (b"\x8b\xff\xff\xff\x7f", "integer of"),
        (b"X\xff\xff\xff\xffabc", "too early"),
        (b"X\x02\x00\x00\x00\xff\xfe", "UTF-8"),
        (b"c" + b"x" * 5000, "no end"),
        (b"}]K\x01s", "list as a dictionary key"),
        (b"}N\x85\x85K\x01s", "tuple as a dictionary key"),
        (b"K\x01K\x02a", "list items without a list"),
        (b"K\x01}b", "state for a int"),
        (b"K\x01)R", "call of something"),
        (b"ctorch\nSize\nK\x01\x85R", "torch.Size"),
        (b"ccollections\nOrderedDict\n(K\x01K\x02K\x03tR", "wrong arguments"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R", "Latin-1"),
        (b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R", "no number"),
        (b"\x80\x04", "protocol 4"),
        (b"i__builtin__\neval\n", "opcode b'i'"),
        (b"", "operand|more than one"),
    ],
)  # fmt: skip
def test_damaged_pickles(path, opcodes, message):
    with pytest.raises(CheckpointError, match=message):
        load(path, program(opcodes))


def test_memory_stays_small_for_large_promises(path):
    """Memo slots, counts and shapes that only a file of terabytes could hold."""
    import tracemalloc

    tracemalloc.start()
    for opcodes in (b"Nr\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", tensor(0, [2**40], [0])):
        with contextlib.suppress(CheckpointError):
            load(path, program(opcodes))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_one_storage_cannot_be_copied_without_end(path):
    pickled = program(b"(" + tensor(0, [6], [1]) * 100 + b"t")
    with TorchFile(write(path, pickled)) as file, pytest.raises(CheckpointError, match="too many"):
        [part.array() for part in file.content]


def test_archives_that_torch_does_not_write(path):
    pickled = program(tensor(0, [6], [1]))
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(write(path, pickled, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="little-endian"):
        load(path, pickled, byteorder=b"big")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        load(path, pickled, **{"other/data.pkl": b""})
    path.write_bytes(pickled)
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        TorchFile(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match="not a complete file"):
        TorchFile(path)


def test_truncated_and_changed_files(path):
    whole = write(path, program(tensor(0, [6], [1]))).read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"hostile\.pt"):
            TorchFile(path)
    begin = whole.index(FLOATS.tobytes())
    path.write_bytes(whole[: begin + 5] + b"\x01" + whole[begin + 6 :])
    with TorchFile(path) as file, pytest.raises(CheckpointError, match="CRC-32"):
        file.content.array()


SEED_PICKLE = program(
    b"}(X\x06\x00\x00\x00moduleccollections\nOrderedDict\n)R(X\x01\x00\x00\x00w"
    + tensor(0, [2, 3], [3, 1])
    + b"q\x01u}X\x09\x00\x00\x00_metadata}sbX\x04\x00\x00\x00stepK\x05X\x06\x00\x00\x00scaler"
    b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}X\x01\x00\x00\x00aG@\x00\x00\x00\x00"
    b"\x00\x00\x00sbX\x04\x00\x00\x00tiedh\x01u"
)


def all_arrays(value, depth=0):
    """Reads every tensor, as a caller would."""
    if hasattr(value, "array"):
        value.array()
    elif isinstance(value, dict) and depth < 9:
        for item in value.values():
            all_arrays(item, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 9:
        for item in value[:100]:
            all_arrays(item, depth + 1)


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_mutated_pickles_are_read_or_refused(path, data):
    """Bytes replaced, cut out or repeated: a value or a CheckpointError, nothing else."""
    pickled = bytearray(SEED_PICKLE)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(pickled) - 1))
        kind = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
        if kind == "replace":
            pickled[place] = data.draw(st.integers(0, 255))
        elif kind == "remove":
            del pickled[place : place + data.draw(st.integers(1, 4))]
        else:
            pickled[place:place] = pickled[place : place + data.draw(st.integers(1, 20))]
    with contextlib.suppress(CheckpointError), TorchFile(write(path, bytes(pickled))) as file:
        all_arrays(file.content)


def test_mutated_archives_are_read_or_refused(path):
    whole = write(path, SEED_PICKLE).read_bytes()
    generator, begin = random.Random(3), time.monotonic()
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError), TorchFile(path) as file:
            all_arrays(file.content)
    assert time.monotonic() - begin < 30
