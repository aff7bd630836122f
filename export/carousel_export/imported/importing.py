"""Importing a model, from a file of somebody else's to the bundle on disk, read from top to bottom."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from carousel_export.draw import Draw, given_streams
from carousel_export.errors import ExampleError, ModelError
from carousel_export.experiments import choose
from carousel_export.gate import prove
from carousel_export.golden import GOLDEN, write_golden
from carousel_export.graph import MODEL
from carousel_export.imported.foreign import Foreign, Plan, Scalar, Value, port
from carousel_export.imported.layout import draw, name_inputs, name_outputs
from carousel_export.imported.onnx_file import OnnxFile
from carousel_export.imported.pairs import find_pairs, fits, is_lengths
from carousel_export.imported.reference import FileReference
from carousel_export.imported.torch_file import TorchFile
from carousel_export.manifest import describe
from carousel_export.policies import Policy, named
from carousel_export.quiet import undisturbed
from carousel_export.reference import Stream
from carousel_export.report import render
from carousel_export.runtimes import OnnxRuntime, Runtime, TorchScript
from carousel_export.signature import BATCH, SUPPORTED_DTYPES, TIME, Dims, Signature, State
from carousel_export.torchscript import TORCHSCRIPT
from carousel_protos.bundle import Bundle, BundleWriter, sha256

log = logging.getLogger(__name__)


def import_model(
    file: str | Path,
    *,
    name: str,
    out: str | Path = "models",
    states: Mapping[str, str] | None = None,
    inputs: Mapping[str, tuple[torch.dtype, Sequence[str]]] | None = None,
    constants: Mapping[str, Scalar] | None = None,
    lengths: str | None = None,
    policy: Policy | None = None,
    version: str | None = None,
    metadata: Mapping[str, str] | None = None,
    data: Sequence[Tensor | Sequence[Tensor]] = (),
) -> Bundle:
    """Make a bundle of an ONNX or TorchScript file that has its state as inputs and outputs, and prove it.

    `states` pairs state inputs with outputs; those that are unambiguous are found by name, structure or shape. `inputs`
    gives dtype and axes where the file does not say them: `{"x": (torch.float32, ("batch", "time", "80"))}`, and for
    a state `("2", "batch", "128")`; the batch may be anywhere. `constants` are inputs that are always the same.
    `lengths` is the file's own input for the valid frames of each row. Other arguments are those of `export`.

    The reference of the gate and of the golden vectors is the file itself, whole and in blocks, run as it came. Raises
    `ExportError` and `BundleError`; then there is no bundle.
    """
    path = Path(file)
    writer = BundleWriter(out, name, version)
    given = {key: tuple(dims) for key, (_, dims) in (inputs or {}).items()}
    with undisturbed():
        foreign = _open(path, {key: dtype for key, (dtype, _) in (inputs or {}).items()})
        fixed = _constants(foreign, constants or {})
        plan = _plan(foreign, given, fixed, states or {}, lengths)
        signature = plan.signature
        reference = FileReference(foreign, plan)
        trial = Draw(signature, [_sample(plan, foreign)], given_streams(signature, data))
        findings = reference.find_policies(trial)
        default, policies = choose(policy, findings)
        pairs = ", ".join(f"{state.input} → {state.output}" for state in signature.states)
        log.info("%s: states %s", path.name, pairs or "none")
        if findings.reason:
            log.info("%s allows %s only: %s", name, named(policies), findings.reason)
        with writer:
            written = foreign.write(writer.path, plan)
            runtimes = _runtimes(writer.path, written)
            proof = prove(runtimes, reference, trial, policies, ragged=findings.ragged)
            write_golden(writer.path / GOLDEN, reference, trial, policies)
            manifest = describe(
                signature,
                policies,
                default,
                ragged=findings.ragged,
                model=written[0],
                torchscript=TORCHSCRIPT if TORCHSCRIPT in written else "",
            )
            manifest.name, manifest.version = name, writer.version
            manifest.parameters = foreign.parameters
            manifest.notes.extend(findings.notes)
            manifest.metadata.update(metadata or {})
            manifest.metadata.update({"imported from": path.name, "imported sha256": sha256(path)})
            (writer.path / "parity.json").write_text(json.dumps(proof, allow_nan=False), encoding="utf-8")
            writer.list_files(manifest)
            (writer.path / "report.html").write_text(render(manifest, proof), encoding="utf-8")
            return writer.commit(manifest)


def _open(path: Path, dtypes: Mapping[str, torch.dtype]) -> Foreign:
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    if unknown := [dtype for dtype in dtypes.values() if dtype not in SUPPORTED_DTYPES]:
        raise ExampleError(f"{unknown[0]} is no dtype of a bundle; give float32, a whole number's or bool")
    return OnnxFile(path) if path.suffix == ".onnx" else TorchFile(path, dtypes)


def _constants(foreign: Foreign, given: Mapping[str, Scalar]) -> dict[str, Tensor | Scalar]:
    values = {value.name: value for value in foreign.inputs}
    constants: dict[str, Tensor | Scalar] = {}
    for name, number in given.items():
        if name not in values:
            raise ExampleError(f"--constant {name} names no input of {foreign.path.name}; it has {', '.join(values)}")
        value = values[name]
        if value.number:
            constants[name] = number
            continue
        if value.dynamic:
            raise ExampleError(f"{value} has an axis without a size; a constant has one value for all")
        shape = tuple(dim for dim in value.dims or () if isinstance(dim, int))
        constants[name] = torch.full(shape, number, dtype=value.dtype or torch.tensor(number).dtype)
    return constants


def _plan(
    foreign: Foreign,
    given: Mapping[str, Dims],
    constants: Mapping[str, Tensor | Scalar],
    states: Mapping[str, str],
    lengths: str | None,
) -> Plan:
    dims = name_inputs(foreign, given, constants)
    outputs = name_outputs(foreign, dims, constants)
    values = {v.name: Value(v.name, v.dtype, dims[v.name]) for v in foreign.inputs if v.name in dims}
    if lengths is not None and (lengths not in values or values[lengths].dims != (BATCH,)):
        raise ExampleError(f"--lengths {lengths} is no input with one value a row; there is {_listed(values.values())}")
    lengths = lengths or next((name for name, value in values.items() if is_lengths(value)), None)
    timed = [name for name, value in values.items() if TIME in (value.dims or ())]
    pairs = find_pairs([v for v in values.values() if v.name != lengths], list(outputs.values()), states, timed=timed)
    free = [value for value in outputs.values() if value.name not in pairs.values()]
    # Without time anywhere, the file takes one frame a call: what is no state, and could be none.
    stepwise = not timed
    if stepwise:
        others = [value for name, value in values.items() if name not in (*pairs, lengths)]
        known = states or (pairs and len(others) == 1)
        timed = [value.name for value in others if known or not any(fits(value, output) for output in free)]
    loose = [value for name, value in values.items() if name not in (*timed, *pairs, lengths)]
    if stepwise and not loose and not (pairs and timed):
        raise ExampleError(
            f"{foreign.path.name} has no time axis and no {'state' if timed else 'input beside its states'}: it takes "
            f"{_listed(values.values())}; name axes with --input, and states with --state"
        )
    if loose:
        raise ExampleError(_ask(loose, free))
    axes = {**dims, **{key: tuple(map(str, value.dims or ())) for key, value in outputs.items()}}
    signature = Signature(
        inputs=tuple(port(values[key], axes[key], stepwise=stepwise) for key in timed),
        outputs=tuple(
            port(value, axes[key], stepwise=stepwise) for key, value in outputs.items() if key not in pairs.values()
        ),
        states=tuple(_state(values[key], output) for key, output in pairs.items()),
        bidirectional=False,
    )
    kind = values[lengths].dtype if lengths is not None else None
    counted = (lengths, kind) if lengths is not None and kind is not None else None
    return Plan(signature, axes, constants, counted, stepwise)


def _state(value: Value, output: str) -> State:
    assert value.dtype is not None, "a plain number is a constant"
    shape = tuple(int(str(dim)) for dim in value.dims or () if dim != BATCH)
    return State(value.name, output, "", shape, value.dtype)


def _ask(loose: Sequence[Value], free: Sequence[Value]) -> str:
    """The line that says what is not known, and the flags that say it."""
    words = []
    for value in loose:
        mates = ", ".join(output.name for output in free if fits(value, output))
        choice = f"--state {value.name}=OUT, of {mates}" if mates else f"--constant {value.name}=VALUE"
        words.append(f"{value}: {choice}")
    return f"it is not clear what these inputs are: {'; '.join(words)}"


def _listed(values: object) -> str:
    return ", ".join(map(str, values)) or "none"  # type: ignore[call-overload]  # an iterable


def _sample(plan: Plan, foreign: Foreign) -> Stream:
    """Frames like those that the file was tried with: normal numbers, 0 and 1 for whole ones."""
    values = [value for value in foreign.inputs if value.name in {p.name for p in plan.signature.inputs}]
    drawn = draw(values, plan.dims)
    tensors = []
    for each in plan.signature.inputs:
        # A row, or of a file without time all rows as frames of one stream.
        x = drawn[each.name].movedim(plan.axis(each.name), 0) if plan.stepwise else each.fetch(drawn[each.name])[0]
        ids = torch.arange(x.numel()).reshape(x.shape) % 2
        tensors.append(x if x.is_floating_point() else ids.to(x.dtype))
    return Stream(tuple(tensors))


def _runtimes(folder: Path, written: Sequence[str]) -> tuple[Runtime, ...]:
    runtimes: dict[str, type[OnnxRuntime] | type[TorchScript]] = {MODEL: OnnxRuntime, TORCHSCRIPT: TorchScript}
    return tuple(runtimes[file](folder) for file in written)
