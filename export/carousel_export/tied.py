"""Tied weights stay one: torch writes a linear layer's weight transposed, beside the embedding that it is."""

from pathlib import Path

import onnx
from onnx import numpy_helper


def tie(path: Path) -> None:
    """Replace every matrix of a graph's file that is another one's transpose by a Transpose of that one."""
    model = onnx.load(path)
    graph = model.graph
    known: dict[tuple[tuple[int, ...], bytes], str] = {}
    nodes = []
    for each in graph.initializer:
        if len(each.dims) == 2:
            array = numpy_helper.to_array(each)
            # Only an earlier one: a symmetric matrix is not its own.
            if (first := known.get((array.T.shape, array.T.tobytes()))) is not None:
                nodes.append(onnx.helper.make_node("Transpose", [first], [each.name], perm=[1, 0]))
            else:
                known[array.shape, array.tobytes()] = each.name
    if not nodes:
        return
    gone = {node.output[0] for node in nodes}
    kept = [each for each in graph.initializer if each.name not in gone]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    onnx.save(model, path)
