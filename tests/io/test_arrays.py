"""`.npz` files from anywhere: nothing is executed, and nothing is believed that is not there."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.array_data import ArrayData
from rsi_deploy.io.arrays import read_npz
from rsi_deploy.runtime.feeds.user_feeds import read_feeds


class WritesAFile:
    """Executed when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def header(shape, dtype="<f4", size=None):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def archive(path, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_what_numpy_writes_is_read(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.ones((3, 4), np.float32)),
        "c": np.array(5),
        "d": np.zeros((0, 3), np.uint8),
        "e": np.array([True]),
        "f": np.array(["text"]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_npz(tmp_path / "a.npz")
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[key], arrays[key]) and found[key].dtype == arrays[key].dtype for key in arrays)


def test_a_pickle_is_not_executed(tmp_path):
    trace = tmp_path / "executed"
    np.savez(tmp_path / "a.npz", x=np.array([WritesAFile(trace)], object))
    with pytest.raises(ValueError, match="pickled objects, which are refused"):
        read_npz(tmp_path / "a.npz")
    archive(tmp_path / "b.npz", x=pickle.dumps(WritesAFile(trace)))
    with pytest.raises(ValueError, match="has a header that cannot be read"):
        read_npz(tmp_path / "b.npz")
    assert not trace.exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["x"]
    assert trace.exists()  # the trap works


@pytest.mark.parametrize(
    "content",
    [
        header((1 << 28,)),
        header((1 << 60,)),
        header((1 << 40, 1 << 40)),
        header((-1,)),
        header((4,)) + b"\0" * 15,
        header((4,)) + b"\0" * 17,
        header((1 << 62,), "|S0") + b"\0",
        header((4,), "|O") + b"\0" * 32,
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535,
        b"\x93NUMPY\x03\x00",
        b"nothing",
        b"",
    ],
)
def test_a_header_that_claims_what_is_not_there(tmp_path, content):
    path = archive(tmp_path / "a.npz", x=content)
    with pytest.raises(ValueError, match=r"array 'x'"):
        read_npz(path)
    for read in (read_feeds, ArrayData.from_npz):
        with pytest.raises(UsageError, match=r"a\.npz"):
            read(path)


def test_an_archive_that_unpacks_to_far_more(tmp_path, monkeypatch):
    """Zeros, a thousand times as many as bytes, are refused before any is unpacked; what is small or stored is not."""
    path = archive(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, x=header((1 << 23,)) + bytes(1 << 25))
    assert path.stat().st_size < 1 << 16
    assert not read_npz(path)["x"].any()
    monkeypatch.setattr("rsi_deploy.io.archives.UNPACKED_BYTES", 1 << 24)
    with pytest.raises(ValueError, match=r"would unpack to 33554\d+, which is refused; write it without compression"):
        read_npz(path)
    assert not read_npz(archive(tmp_path / "b.npz", x=header((1 << 23,)) + bytes(1 << 25)))["x"].any()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compression_that_numpy_does_not_write(tmp_path, method):
    with pytest.raises(ValueError, match="compression"):
        read_npz(archive(tmp_path / "a.npz", method, x=header((1,)) + bytes(4)))


def test_other_archives(tmp_path):
    path = archive(tmp_path / "a.npz", x=header((1,)) + bytes(4))
    content = path.read_bytes()
    for damaged in (content[:-10], content[:40], content.replace(b"PK\x01\x02", b"PK\x01\x03"), b"PK", b""):
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="archive"):
            read_npz(tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as file:
        file.writestr("notes.txt", "text")
    with pytest.raises(ValueError, match=r"'notes\.txt'"):
        read_npz(tmp_path / "c.npz")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("x.npy", header((1,)) + bytes(4))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("x.npy", header((1,)) + bytes(4))
    with pytest.raises(ValueError, match="a name twice"):
        read_npz(tmp_path / "d.npz")
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    (tmp_path / "e.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a zip archive"):
        read_npz(tmp_path / "e.npz")
