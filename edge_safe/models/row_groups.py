"""Rows in groups of like origin, drawn so that no group or source drowns another."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from edge_safe.models.data import Row


class RowGroups:
    """Rows of one label: from files, our own, and contrasts."""

    def __init__(self, *groups: Sequence[Row]) -> None:
        """Sorts the rows of each group by source; a group without rows is left out."""
        self._groups: list[dict[str, list[Row]]] = []
        for rows in groups:
            by_source: defaultdict[str, list[Row]] = defaultdict(list)
            for row in rows:
                by_source[row.source].append(row)
            if by_source:
                self._groups.append(dict(sorted(by_source.items())))

    def __bool__(self) -> bool:
        """Whether there is any row."""
        return bool(self._groups)

    def draw(self, chance: random.Random) -> Row:
        """A row: every group is as likely as another, within it every source, within it every row.

        Args:
            chance: Draws.
        """
        sources = chance.choice(self._groups)
        return chance.choice(sources[chance.choice(list(sources))])

    def where(self, wanted: Callable[[Row], bool]) -> RowGroups:
        """The rows for which ``wanted`` says so, in the same groups."""
        return RowGroups(
            *(
                [row for rows in sources.values() for row in rows if wanted(row)]
                for sources in self._groups
            )
        )
