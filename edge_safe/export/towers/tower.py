"""A tower whose weights stand in a file of its own, so that a text request never reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge_safe.export.families.base import Emission, TowerCase
from edge_safe.export.graphs.builder import GraphBuilder
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.store import WeightStore

Build = Callable[[Emission, WeightStore], tuple[GraphBuilder, list[Matrix]]]


@dataclass(frozen=True, slots=True)
class GraphTower:
    """One tower.

    Attributes:
        name: Name of the graph.
        build: Makes the graph; weights go into the store it is given.
        make_cases: Inputs with what torch makes of them.
    """

    name: str
    build: Build
    make_cases: Callable[[], Iterable[TowerCase]]

    def emit(self, emission: Emission) -> list[Matrix]:
        """Writes ``{name}.onnx`` and ``{name}.onnx.data``."""
        path = emission.folder / f"{self.name}.onnx"
        with WeightStore(path.with_name(f"{path.name}.data")) as store:
            graph, matrices = self.build(emission, store)
        graph.save(path)
        return matrices

    def cases(self) -> Iterable[TowerCase]:
        """Inputs on which the graph has to agree with torch."""
        return self.make_cases()
