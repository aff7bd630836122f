"""What look-ahead buys: agreement with the offline answer against cost and latency."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carousel_export.draw import Draw
from carousel_export.policies import Carry, Full, Lookahead, Policy, to_json
from carousel_export.reference import Answer, Stream
from carousel_export.replay import replay
from carousel_export.runtimes import Runtime
from carousel_export.signature import Port, Signature

_SETTINGS: tuple[Carry | Lookahead, ...] = (
    Carry(1),
    *(Lookahead(block, ahead) for block in (1, 8) for ahead in (0, 1, 2, 4, 8, 16)),
)
_STREAMS, _FRAMES = 8, 64


def lookahead_curve(runtime: Runtime, signature: Signature, draw: Draw, *, ragged: bool) -> list[dict[str, Any]]:
    """For each setting and output with floats: how far the answer is from the offline one, on given or drawn data.

    `cost` is frames run for each frame answered, `latency_frames` how many frames after its own the last answer of a
    block may wait for, block and ahead together.
    """
    streams = draw.given or tuple(draw.stream(_FRAMES) for _ in range(_STREAMS))

    def answers(policy: Policy) -> Sequence[Answer]:
        return replay(
            runtime, signature, [Stream(s.inputs, contexts=s.contexts) for s in streams], policy, ragged=ragged
        )

    offline = answers(Full())
    points = []
    for setting in _SETTINGS:
        streamed = answers(setting)
        ahead = setting.ahead if isinstance(setting, Lookahead) else 0
        block = setting.block or 1
        for i, port in enumerate(signature.outputs):
            if port.dtype.is_floating_point:
                wanted, got = (torch.cat([a.outputs[i] for a in side]) for side in (offline, streamed))
                points.append(
                    {
                        "policy": to_json(setting),
                        "output": port.name,
                        **_distance(port, wanted, got),
                        "cost": (block + ahead) / block,
                        "latency_frames": block + ahead,
                    }
                )
    return points


def _distance(port: Port, wanted: Tensor, got: Tensor) -> dict[str, float]:
    same = wanted.argmax(-1) == got.argmax(-1) if len(port.dims) > 2 else wanted == got
    difference = wanted - got
    return {
        "argmax_agreement": float(same.double().mean()),
        "max_abs_difference": float(difference.abs().max()),
        "rms_relative_difference": float(
            difference.square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-12)
        ),
    }
