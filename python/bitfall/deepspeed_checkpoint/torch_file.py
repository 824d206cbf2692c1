"""Reads a file of torch.save without torch: the zip format of torch 1.6 and later.

The archive holds data.pkl, the pickle, and one file of raw little-endian memory per storage, each
uncompressed. Source: torch/serialization.py.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING, Any

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.allowed_names import resolve
from bitfall.deepspeed_checkpoint.pickle_machine import PickleError, PickleMachine
from bitfall.deepspeed_checkpoint.tensors import Storage, StorageType

if TYPE_CHECKING:
    from pathlib import Path

PICKLE_START = b"\x80\x02"  # of the format before zip

# What the standard library's zip reader raises for damaged archives; PickleError is a ValueError.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    ValueError,
    struct.error,
)


class TorchFile:
    """One file of torch.save: `content` is its object, tensors in it are StoredTensor.

    Raises CheckpointError that names the file for everything that is wrong with it. Storages are
    read, and compared with their checksums, when a tensor is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storages: dict[str, Storage] = {}
        self._unclaimed_bytes = path.stat().st_size
        self._file = path.open("rb")
        try:
            if self._file.read(len(PICKLE_START)) == PICKLE_START:
                raise PickleError("written by torch before 1.6; load and save it with a newer one")
            self._archive = zipfile.ZipFile(self._file)
            self._records = {record.filename: record for record in self._archive.infolist()}
            self._root = self._find_root()
            self._check_byte_order()
            pickled = io.BytesIO(self._read(f"{self._root}data.pkl"))
            self.content: Any = PickleMachine(pickled, resolve, self._storage).load()
        except ZIP_ERRORS as error:
            self._file.close()
            raise self._damaged(error) from None

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; tensors that were not asked for cannot be read any more."""
        self._file.close()

    def _find_root(self) -> str:
        roots = [name[: -len("data.pkl")] for name in self._records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise PickleError("no file of torch.save (it holds no data.pkl)")
        return roots[0]

    def _check_byte_order(self) -> None:
        name = f"{self._root}byteorder"
        if name in self._records and self._read(name) != b"little":
            raise PickleError("its numbers are not little-endian; save it anew on this machine")

    def _read(self, name: str) -> bytes:
        record = self._records.get(name)
        if record is None:
            raise PickleError(f"it lacks the record '{name}'; copy the checkpoint anew")
        if record.compress_type != zipfile.ZIP_STORED:
            raise PickleError(f"the record '{name}' is compressed, which torch.save never does")
        return self._archive.read(record)

    def _storage(self, identifier: Any) -> Storage:
        """The storage that ("storage", type, key, device, numel) names."""
        if not isinstance(identifier, tuple) or len(identifier) != 5:
            raise PickleError("a reference to something that is no storage")
        word, kind, key, _, numel = identifier
        if word != "storage" or not isinstance(kind, StorageType) or not isinstance(key, str):
            raise PickleError("a reference to something that is no storage")
        if key not in self._storages:
            self._storages[key] = self._claim(f"{self._root}data/{key}", kind, numel)
        storage = self._storages[key]
        if (storage.dtype, storage.numel) != (kind.dtype, numel):
            raise PickleError(f"storage '{key}' is named with two types or sizes")
        return storage

    def _claim(self, name: str, kind: StorageType, numel: Any) -> Storage:
        record = self._records.get(name)
        if record is None:
            raise PickleError(f"it lacks the record '{name}'; copy the checkpoint anew")
        if type(numel) is not int or record.file_size != numel * kind.item_bytes:
            raise PickleError(
                f"the record '{name}' has {record.file_size} bytes, which are not"
                f" {str(numel)[:20]} elements of {kind.dtype}"
            )
        self._unclaimed_bytes -= record.file_size
        if self._unclaimed_bytes < 0:  # records that lie upon each other
            raise PickleError("its storages are larger than the file")
        return Storage(self.path, kind.dtype, numel, lambda: self._read_storage(name))

    def _read_storage(self, name: str) -> bytes:
        try:
            return self._read(name)
        except ZIP_ERRORS as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> CheckpointError:
        if isinstance(error, PickleError):
            return CheckpointError(f"{self.path}: {error}")
        return CheckpointError(
            f"{self.path}: not a complete file of torch.save ({str(error)[:120]}); copy the"
            " checkpoint anew, or use an earlier one"
        )
