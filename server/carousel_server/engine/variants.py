"""Variants of one model: the same tensors and states, other arithmetic. Each has graphs of its own."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from carousel_protos.v1.manifest_pb2 import Manifest, PolicyKind, Tolerance
from carousel_server.errors import LoadError, VariantError


@dataclass(frozen=True)
class Variants:
    """The graphs that are loaded, by variant and policy."""

    model: str
    default: str
    tolerances: Mapping[str, Tolerance]
    _graphs: Mapping[tuple[str, PolicyKind.ValueType], str]

    @classmethod
    def read(cls, manifest: Manifest, loaded: Container[str], *, default: str) -> "Variants":
        """`loaded`: the files of the graphs that there are. Raises `LoadError` where none is of the default."""
        graphs = [graph for graph in manifest.graphs if graph.file in loaded]
        tolerances = {
            graph.variant: graph.tolerance if graph.HasField("tolerance") else manifest.tolerance for graph in graphs
        }
        if default not in tolerances:
            raise LoadError(
                f"{manifest.name} has no variant {default} for this runtime, it has {', '.join(tolerances) or 'none'}; "
                f"export it with --variant {default}, or serve another"
            )
        by_policy = {(graph.variant, kind): graph.file for graph in graphs for kind in graph.policies}
        return cls(manifest.name, default, tolerances, by_policy)

    def choose(self, asked: str) -> str:
        """The variant that is asked for, the default where none is. Raises `VariantError` for one that is not here."""
        if asked and asked not in self.tolerances:
            raise VariantError(f"{self.model} has no variant {asked!r} here; it has {', '.join(self.tolerances)}")
        return asked or self.default

    def graph(self, variant: str, kind: PolicyKind.ValueType) -> str:
        """The file of the graph that computes a policy."""
        return self._graphs[variant, kind]
