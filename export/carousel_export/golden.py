"""golden.safetensors: streams and what eager PyTorch answers, so that a host without torch can verify a bundle."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from carousel_export.draw import Draw
from carousel_export.policies import Carry, Causal, Lookahead, Policy, to_json
from carousel_export.reference import Source, Stream
from carousel_export.signature import Signature

GOLDEN = "golden.safetensors"
_LENGTHS = (1, 7, 18, 31)


def write_golden(path: Path, reference: Source, draw: Draw, policies: Sequence[Policy]) -> None:
    """Write cases for each policy, with eager PyTorch's answers; causal and carry start from a non-zero state."""
    signature = reference.signature
    tensors: dict[str, Tensor] = {}
    cases = []
    for policy in _cases(policies, signature.right_context):
        name = _name(policy)
        cases.append({"name": name, "policy": to_json(policy), "sequences": len(_LENGTHS)})
        for i, frames in enumerate(signature.lengths(_LENGTHS)):
            stream = draw.stream(frames, initial=isinstance(policy, Causal | Carry))
            answer = reference.run(stream, policy)
            at = f"{name}/{i}"
            for port, x in zip(signature.inputs, stream.inputs, strict=True):
                tensors[f"{at}/in/{port.name}"] = x
            for port, x in zip(signature.contexts, stream.contexts, strict=True):
                tensors[f"{at}/context/{port.name}"] = x
            for state, value in zip(signature.states, stream.initial or (), strict=bool(stream.initial)):
                tensors[f"{at}/initial/{state.input}"] = value
            for port, y in zip(signature.outputs, answer.outputs, strict=True):
                tensors[f"{at}/out/{port.name}"] = y
    contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(contiguous, metadata={"cases": json.dumps(cases)}))


def read_samples(path: Path, signature: Signature) -> list[Stream]:
    """The golden streams, as samples to draw more from."""
    with safe_open(path, framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
        return [
            Stream(
                tuple(file.get_tensor(f"{case['name']}/{i}/in/{port.name}") for port in signature.inputs),
                contexts=tuple(
                    file.get_tensor(f"{case['name']}/{i}/context/{port.name}") for port in signature.contexts
                ),
            )
            for case in cases
            for i in range(case["sequences"])
        ]


def _cases(policies: Sequence[Policy], right_context: int) -> list[Policy]:
    cases: list[Policy] = []
    for policy in policies:
        # With a fixed block the answer is a function of the stream, however it is cut.
        cases.append(Carry(policy.block or 5) if isinstance(policy, Carry) else policy)
        if isinstance(policy, Lookahead):
            others = [Lookahead(1, 3 + right_context), Lookahead(4, right_context)]
            cases += [variant for variant in others if variant != policy]
    return cases


def _name(policy: Policy) -> str:
    match policy:
        case Lookahead(block, ahead):
            return f"lookahead-{block}-{ahead}"
        case Carry(block):
            return f"carry-{block}"
    return type(policy).__name__.lower()
