"""What the file itself answers under a policy, one sequence at a time, and what that says of the model."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from carousel_export.culprits import same
from carousel_export.draw import Draw
from carousel_export.errors import ExampleError
from carousel_export.experiments import Findings
from carousel_export.imported.foreign import Foreign, Plan, to_contract, to_file
from carousel_export.policies import Carry, Causal, Full, Policy
from carousel_export.reference import Answer, Stream

_FRAMES = 23
_CUTS = (1, 2, 5, 3, 1, 7, 4)


class FileReference:
    """The original file, run by what it was made for. There is no eager model to ask."""

    def __init__(self, foreign: Foreign, plan: Plan) -> None:
        self.signature = plan.signature
        self.name = f"{foreign.path.name}, run as it came by {foreign.runtime}"
        self._foreign = foreign
        self._plan = plan

    def run(self, sequence: Stream, policy: Policy) -> Answer:
        """The stream's answer: the file called piece by piece, its states handed on."""
        signature = self.signature
        states = [state.unsqueeze(0) for state in sequence.initial or [state.zeros() for state in signature.states]]
        parts = []
        for piece in policy.pieces(sequence.frames, sequence.cuts):
            inputs = [x[piece.start : piece.start + piece.block].unsqueeze(0) for x in sequence.inputs]
            lengths = torch.tensor([piece.block], dtype=torch.int32)
            for frames, count in self._calls(inputs, lengths):
                results = self._run([*frames, count, *states])
                parts.append(results[: len(signature.outputs)])
                states = results[len(signature.outputs) :]
        outputs = [
            torch.cat(column, 1)[0] if port.timed else column[-1][0]
            for port, column in zip(signature.outputs, zip(*parts, strict=True), strict=True)
        ]
        return Answer(tuple(outputs), tuple(state[0] for state in states))

    def _calls(self, inputs: Sequence[Tensor], lengths: Tensor) -> list[tuple[list[Tensor], Tensor]]:
        """A piece as the file takes it: at once, or frame by frame."""
        if not self._plan.stepwise:
            return [(list(inputs), lengths)]
        return [([x[:, i : i + 1] for x in inputs], torch.ones_like(lengths)) for i in range(int(lengths))]

    def find_policies(self, draw: Draw) -> Findings:
        """Causal where any cut of a stream is answered as the whole; else carry and full, or full alone."""
        stream = draw.stream(_FRAMES)
        stream = Stream(stream.inputs, None, _CUTS)
        whole = self.run(stream, Full())
        signature = replace(self.signature, ragged=self._is_ragged(draw))
        if not self.signature.states:
            return Findings((Full,), signature, "it has no state to carry")
        try:
            cut = self.run(stream, Causal())
        except ExampleError:
            return Findings((Full,), signature, "it does not run on few frames")
        if all(map(same, (*whole.outputs, *whole.states), (*cut.outputs, *cut.states))):
            return Findings((Causal, Carry, Full), signature)
        return Findings((Carry, Full), signature, "in blocks it answers otherwise than on the whole")

    def _is_ragged(self, draw: Draw) -> bool:
        """Whether a row beside a longer one is answered as alone: only a file that takes lengths can."""
        if self._plan.stepwise:
            return True  # each row's states stop at its own end; the gate tries it
        if self._plan.lengths is None:
            return False
        lengths = (_FRAMES, 9)
        streams = [draw.stream(length) for length in lengths]
        alone = [self.run(stream, Full()) for stream in streams]
        padding = draw.stream(_FRAMES)
        inputs = [
            torch.stack([torch.cat([s.inputs[i], pad[s.frames :]]) for s in streams])
            for i, pad in enumerate(padding.inputs)
        ]
        states = [state.zeros(len(lengths)) for state in self.signature.states]
        results = self._run([*inputs, torch.tensor(lengths, dtype=torch.int32), *states])
        for row, (answer, length) in enumerate(zip(alone, lengths, strict=True)):
            wanted = (*answer.outputs, *answer.states)
            timed = [port.timed for port in self.signature.outputs] + [False] * len(states)
            for value, got, cut in zip(wanted, results, timed, strict=True):
                if not same(value, got[row][:length] if cut else got[row]):
                    return False
        return True

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return to_contract(self._plan, self._foreign, self._foreign.run(to_file(self._plan, tensors)))
