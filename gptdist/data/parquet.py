"""Documents of a Parquet file, a row group's column at a time. Needs pyarrow (extra `data`)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptdist.errors import MissingError, UserError

_ROWS_AT_A_TIME = 256


class ParquetColumn:
    """The strings of one column. Memory holds a few pages of it, whatever the size of the row groups."""

    def __init__(self, path: Path, field: str):
        """Raises UserError for a file that is not Parquet or lacks the column, MissingError without pyarrow."""
        self._arrow, parquet = _import_pyarrow(path)
        self._path, self._field = path, field
        try:
            # Pages have a checksum where the writer made one; then no damage goes unseen.
            self._file = parquet.ParquetFile(path, page_checksum_verification=True)
            schema = self._file.schema_arrow
        except (self._arrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({_one_line(error)}); copy it again") from error
        if field not in schema.names:
            raise UserError(f"{path}: no column {field!r}; columns found: {', '.join(sorted(schema.names)) or 'none'}; "
                            f"pass one of them as --text-field")
        kind = schema.field(field).type
        kind = kind.value_type if self._arrow.types.is_dictionary(kind) else kind
        if not any(check(kind) for check in (self._arrow.types.is_string, self._arrow.types.is_large_string,
                                             self._arrow.types.is_string_view)):
            raise UserError(f"{path}: column {field!r} holds {kind}, expected strings; pass another as --text-field")

    @property
    def n_rows(self) -> int:
        return self._file.metadata.num_rows

    def read(self, start: int, bad: Callable[[UserError], None]) -> Iterator[tuple[int, str]]:
        """Yield (row number from 1, text) of the rows after the first `start`.

        bad: called for a row without a string and for a damaged row group, whose other rows are then left out.
        """
        first = 0  # row of the whole file at which the row group begins
        for group in range(self._file.num_row_groups):
            n_rows = self._file.metadata.row_group(group).num_rows
            if first + n_rows > start:
                yield from self._read_group(group, first, n_rows, start, bad)
            first += n_rows

    def _read_group(self, group: int, first: int, n_rows: int, start: int, bad) -> Iterator[tuple[int, str]]:
        row = first
        try:
            for batch in self._file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[self._field],
                                                 use_threads=False):
                for value in batch.column(0):
                    row += 1
                    if row > start and (text := self._text(row, value, bad)) is not None:
                        yield row, text
        except (self._arrow.ArrowException, OSError) as error:
            bad(UserError(f"{self._path}: row group {group} (rows {first + 1} to {first + n_rows}) is damaged "
                          f"({_one_line(error)}), read up to row {row}; copy the file again"))

    def _text(self, row: int, value: Any, bad) -> str | None:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            bad(UserError(f"{self._path}: row {row}: invalid UTF-8 at byte {error.start} of the text"))
            return None
        if text is None:
            bad(UserError(f"{self._path}: row {row}: {self._field!r} is null, expected a string"))
        return text


def _import_pyarrow(path: Path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingError(f"{path}: Parquet files need the package pyarrow: pip install 'gptdist[data]', or export "
                           f"the file as .jsonl") from error
    return pyarrow, parquet


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
