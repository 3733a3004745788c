"""Long columns of numbers: written to files piece by piece, read from them without loading them,
in folders that are made once and are whole or not there.
"""

import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from common import InputError, files

FACTS = "made.json"  # in each folder: {file: its size in bytes}


class Column:
    """Numbers of one type, appended piece by piece: to a file, to one without a name that ends with
    this process (a folder is given), or in memory (None).
    """

    def __init__(self, dtype, path: Path | None):
        self.dtype, self.size, self.pieces, self.file = np.dtype(dtype), 0, [], None
        if path is not None:
            self.file = tempfile.TemporaryFile(dir=path) if path.is_dir() else path.open("ab")  # noqa: SIM115
            self.size = self.file.tell() // self.dtype.itemsize

    def append(self, values) -> None:
        """Adds numbers; they are with the system when this returns."""
        values = np.asarray(values).astype(self.dtype, copy=False)
        self.size += len(values)
        if self.file is None:
            self.pieces.append(values)
        else:
            self.file.write(values.tobytes())
            self.file.flush()

    def array(self) -> np.ndarray:
        """All numbers, mapped where they are in a file."""
        if self.file is None:
            return np.concatenate([np.zeros(0, self.dtype), *self.pieces])
        return np.memmap(self.file, self.dtype, "r") if self.size else np.zeros(0, self.dtype)

    def close(self) -> None:
        """Ends the writing."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()


def mapped(path: Path, dtype) -> np.ndarray:
    """A file of numbers, mapped: only what is asked for is read."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def release(array: np.ndarray) -> None:
    """Gives back the memory of what was read of a mapped file; the system may keep it as its own
    cache. Reading random places would else map the whole file in the end.
    """
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def read_range(file, dtype, first: int, last: int) -> np.ndarray:
    """The numbers first to last - 1 of an open file, copied: unlike mapped pages they are given
    back when they have been used.
    """
    size = np.dtype(dtype).itemsize
    content = os.pread(file.fileno(), size * (last - first), size * first)
    if len(content) != size * (last - first):
        raise InputError(f"{file.name} is shorter than it was; remove its folder to make it again.")
    return np.frombuffer(content, dtype)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made by `make(part)` where it is not there yet.

    `part` is a folder beside it that an interrupted `make` may find again; it gets the name when it
    is whole. A lock lets one process make it while others, of the same run or of another, wait.
    """
    part, lock_path = (folder.with_name(folder.name + ending) for ending in (".part", ".lock"))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system when the process ends, however it ends
            if not folder.exists():
                part.mkdir(exist_ok=True)
                make(part)
                sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir()) if path.name != FACTS}
                files.write_json(part / FACTS, sizes)
                os.replace(part, folder)
        lock_path.unlink(missing_ok=True)
    sizes = files.read_json(folder / FACTS, expected="remove the folder to make it again")
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            counts = f"{found:,} bytes, not {size:,}"
            raise InputError(f"{folder / name}: holds {counts}; remove the folder to make it again.")
    return folder


def emptied(part: Path) -> Path:
    """The folder without what an interrupted process left in it."""
    shutil.rmtree(part)
    part.mkdir()
    return part


def kth_smallest(blocks: Callable[[], Iterator[np.ndarray]], k: int) -> float:
    """The number at place k, from 0, among numbers of at least 0 in order, exactly, without holding
    them: four passes, each of which counts 16 more bits.

    The bits of floating-point numbers that are not negative are in the order of the numbers.
    """
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for block in blocks():
            bits = (block.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0: a zero without its sign
            if shift < 48:
                bits = bits[bits >> np.uint64(shift + 16) == prefix]
            counts += np.bincount((bits >> np.uint64(shift)) & np.uint64(0xFFFF), minlength=1 << 16)
        ends = counts.cumsum()
        digit = int(np.searchsorted(ends, k, "right"))
        k -= int(ends[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return float(np.array([prefix], np.uint64).view(np.float64)[0])
