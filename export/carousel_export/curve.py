"""What look-ahead buys: agreement with the offline answer against cost and latency."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from carousel_export.draw import Draw
from carousel_export.policies import Carry, Full, Lookahead, Policy, to_json
from carousel_export.reference import Answer, Stream
from carousel_export.replay import replay
from carousel_export.runtimes import Runtime
from carousel_export.signature import Port, Signature

Setting = Carry | Lookahead

_SETTINGS: tuple[Setting, ...] = (
    Carry(1),
    *(Lookahead(block, ahead) for block in (1, 8) for ahead in (0, 1, 2, 4, 8, 16)),
)
_STREAMS, _FRAMES = 8, 64


@dataclass(frozen=True)
class Point:
    """One output under one setting, over all frames of some streams, against the offline answer.

    `argmax_agreement`: how often the largest element of the last dimension is the same one (of an output without such a
    dimension, the same value). `cost`: frames run for each frame answered. `latency_frames`: how many frames may have
    to arrive before a frame is answered, block and ahead together.
    """

    policy: Setting
    output: str
    argmax_agreement: float
    max_abs_difference: float
    rms_relative_difference: float

    @property
    def cost(self) -> float:
        return self.latency_frames / (self.policy.block or 1)

    @property
    def latency_frames(self) -> int:
        return (self.policy.block or 1) + (self.policy.ahead if isinstance(self.policy, Lookahead) else 0)

    def json(self) -> dict[str, Any]:
        """The point as parity.json has it."""
        return {
            "policy": to_json(self.policy),
            "output": self.output,
            "argmax_agreement": self.argmax_agreement,
            "max_abs_difference": self.max_abs_difference,
            "rms_relative_difference": self.rms_relative_difference,
            "cost": self.cost,
            "latency_frames": self.latency_frames,
        }


def lookahead_curve(runtime: Runtime, signature: Signature, draw: Draw, *, ragged: bool) -> list[dict[str, Any]]:
    """The report's curve: a few settings, on the caller's data, or on drawn streams."""
    streams = draw.given or tuple(draw.stream(_FRAMES) for _ in range(_STREAMS))
    settings = [setting for setting in _SETTINGS if signature.fits(setting)]
    points = measure(runtime, signature, streams, settings, ragged=ragged)
    return [point.json() for setting in points for point in setting]


def measure(
    runtime: Runtime,
    signature: Signature,
    streams: Sequence[Stream],
    settings: Sequence[Setting],
    *,
    ragged: bool,
    told: Callable[[], None] = lambda: None,
) -> list[list[Point]]:
    """For each setting a point for each output of floats; `told` is called after each setting."""

    def answers(policy: Policy) -> Sequence[Answer]:
        plain = [Stream(stream.inputs, contexts=stream.contexts) for stream in streams]
        return replay(runtime, signature, plain, policy, ragged=ragged)

    offline = answers(Full())
    points = []
    for setting in settings:
        streamed = answers(setting)
        points.append(
            [
                _point(setting, port, [(a.outputs[i], b.outputs[i]) for a, b in zip(offline, streamed, strict=True)])
                for i, port in enumerate(signature.outputs)
                if port.dtype.is_floating_point
            ]
        )
        told()
    return points


def _point(setting: Setting, port: Port, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Point:
    """Of each stream the offline answer and the streamed one."""
    classes = len(port.dims) > 2
    same = torch.cat([(a.argmax(-1) == b.argmax(-1) if classes else a == b).flatten() for a, b in pairs])
    wanted, got = (torch.cat([answer.flatten() for answer in side]).double() for side in zip(*pairs, strict=True))
    difference = wanted - got
    return Point(
        setting,
        port.name,
        argmax_agreement=float(same.double().mean()),
        max_abs_difference=float(difference.abs().max()),
        rms_relative_difference=float(
            difference.square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-12)
        ),
    )
