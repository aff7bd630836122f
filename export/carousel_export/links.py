"""Links: another exported model whose answers are this one's context and initial state, as an encoder's a decoder's."""

from collections.abc import Mapping
from pathlib import Path

from carousel_export.errors import ExampleError
from carousel_export.signature import TIME, Signature
from carousel_protos.bundle import Bundle, BundleError, newest_version
from carousel_protos.v1 import manifest_pb2 as pb


def find_links(signature: Signature, links: Mapping[str, tuple[str, str]], models: Path) -> list[pb.Link]:
    """The links as the manifest has them, from {context or state input: (model, output)}.

    Raises `ExampleError` where either side is not there, or the output has another shape: a context's named dimension
    takes an output's time, a state `[layers × directions, size]` takes the same.
    """
    wanted = {port.name: port.dims[1:] for port in signature.contexts}
    wanted |= {state.input: state.dims[1:] for state in signature.states}
    found = []
    for name, (model, output) in links.items():
        if name not in wanted:
            raise ExampleError(f"links give {name!r}; a context or a state can be given: {', '.join(wanted)}")
        try:
            manifest = Bundle.open(newest_version(models / model), check=False).manifest
        except BundleError as error:
            raise ExampleError(
                f"links name a model {model!r}, of which {models} has no bundle; export it first"
            ) from error
        outputs = {port.name: port.dims[1:] for port in manifest.outputs}
        if output not in outputs:
            raise ExampleError(f"links name an output {output!r} of {model!r}; its outputs are {', '.join(outputs)}")
        if not _fits(wanted[name], tuple(outputs[output])):
            raise ExampleError(
                f"links give {name!r} [{', '.join(wanted[name])}] what {model!r} answers as {output!r} "
                f"[{', '.join(outputs[output])}]; give them the same dimensions"
            )
        found.append(pb.Link(input=name, model=model, output=output))
    return found


def _fits(wanted: tuple[str, ...], given: tuple[str, ...]) -> bool:
    return len(wanted) == len(given) and all(
        want == have or (have == TIME and not want.isdecimal()) for want, have in zip(wanted, given, strict=True)
    )
