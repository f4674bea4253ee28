"""The output of `classify`: one judgement a line, in input order, that survives a kill.

While a job runs, lines are appended to a temporary file beside the output; when the last row is
done, the output appears at once, whole and in input order. A job that is started again goes on
after the rows that were already judged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from edge_safe.errors import DataError
from edge_safe.evaluation.judge import Judgement

PART_SUFFIX = ".part"


class JudgementFile:
    """Collects the judgements on the rows of one input. Use it as a context manager.

    Attributes:
        done: Lines by id, without their line breaks, of rows that were judged before.
    """

    def __init__(self, path: Path, ids: Sequence[str | int], *, overwrite: bool = False) -> None:
        """Looks at what an earlier run left behind.

        Args:
            path: The output.
            ids: The ids of the input, in its order.
            overwrite: Whether to start afresh.

        Raises:
            DataError: If the output holds something else than judgements on these ids.
        """
        self._path = path
        self._part = path.with_name(path.name + PART_SUFFIX)
        self._ids = list(ids)
        self._file: IO[bytes] | None = None
        self.done: dict[str | int, str] = {}
        if not path.parent.is_dir():
            raise DataError(f"the folder {path.parent} does not exist; create it first")
        if path.is_dir():
            raise DataError(f"{path} is a folder; name a file")
        if overwrite:
            self._part.unlink(missing_ok=True)
        else:
            for source in (path, self._part):
                self.done |= self._read(source)

    def __enter__(self) -> JudgementFile:
        """Opens the temporary file; half a line at its end, left by a kill, is cut off."""
        self._file = self._part.open("ab")
        self._file.truncate(_end_of_last_line(self._part))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the temporary file; what it holds stays for the next run."""
        if self._file is not None:
            self._file.close()

    def add(self, judgement: Judgement) -> None:
        """Writes one judgement as one line.

        Raises:
            OSError: If the disk is full or the file cannot be written.
        """
        line = json.dumps(judgement.to_dict(), ensure_ascii=False)
        if self._file is None:
            raise DataError(f"{self._part} is not open; use the file as a context manager")
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.done[judgement.id] = line

    def counts(self) -> dict[str, int]:
        """How many rows got each decision."""
        decisions = [json.loads(line)["decision"] for line in self.done.values()]
        return {name: decisions.count(name) for name in ("allow", "refuse", "error")}

    def finish(self) -> None:
        """Puts the output in place, in input order, and removes the temporary file.

        Raises:
            DataError: If a row of the input was not judged.
            OSError: If the disk is full or the file cannot be written.
        """
        missing = [identity for identity in self._ids if identity not in self.done]
        if missing:
            raise DataError(f"{len(missing)} rows are not judged yet, the first is {missing[0]!r}")
        whole = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            with whole.open("wb") as file:
                file.writelines(self.done[identity].encode() + b"\n" for identity in self._ids)
                file.flush()
                os.fsync(file.fileno())
            whole.replace(self._path)
        finally:
            whole.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str | int, str]:
        if not path.exists():
            return {}
        known = set(self._ids)
        lines: dict[str | int, str] = {}
        # What follows the last line break was torn by a kill.
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                identity = record["id"]
                judged = "decision" in record and "p_unsafe" in record
            except (ValueError, TypeError, KeyError):
                judged = False
            if not judged:
                raise DataError(
                    f"{path}, line {number}: not a judgement; name another output or use "
                    "--overwrite"
                )
            if identity not in known:
                raise DataError(
                    f"{path}, line {number}: the input has no row {identity!r}; name another "
                    "output or use --overwrite"
                )
            lines[identity] = line.decode()
        return lines


def _end_of_last_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
