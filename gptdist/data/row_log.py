"""A scratch file of rows of one length: appended to, read by number, cut back to a length that was on disk."""

import os
from pathlib import Path

import numpy as np


class RowLog:
    """Rows of `width` elements of a dtype."""

    def __init__(self, path: Path, dtype: str, width: int):
        self._path, self._dtype, self._width = path, np.dtype(dtype), width
        self._row_bytes = self._dtype.itemsize * width
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)

    def append(self, rows: np.ndarray | bytes) -> None:
        self._file.write(rows if isinstance(rows, bytes) else np.ascontiguousarray(rows, self._dtype).tobytes())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), (n, width): those of them that there are."""
        self._file.flush()
        raw = os.pread(self._file.fileno(), (stop - start) * self._row_bytes, start * self._row_bytes)
        return np.frombuffer(raw, self._dtype).reshape(-1, self._width)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate(self, n_rows: int) -> None:
        self._file.truncate(n_rows * self._row_bytes)

    def close(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)
