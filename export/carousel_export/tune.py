"""Which block and how many frames ahead a model needs on given data: the cheapest that reaches a wanted agreement."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from carousel_export.curve import Point, Setting, measure
from carousel_export.draw import given_streams
from carousel_export.errors import ExampleError, PolicyError
from carousel_export.page import curve_figure, environment, policy_name
from carousel_export.policies import Carry, Lookahead, to_json
from carousel_export.quiet import undisturbed
from carousel_export.runtimes import OnnxRuntime
from carousel_export.signature import Signature
from carousel_protos.bundle import Bundle
from carousel_protos.v1 import manifest_pb2 as pb

BLOCKS = (1, 2, 4, 8, 16, 32)
AHEADS = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Tuning:
    """What was measured on how much data; `best` is the cheapest point that reaches what was wanted, if one does."""

    bundle: Bundle
    sequences: int
    frames: int
    # Carry(1) first, for comparison; then each look-ahead setting.
    points: tuple[Point, ...]
    wanted: str
    best: Point | None

    def html(self) -> str:
        """A self-contained page: both charts and the table."""
        return self._render("tune.html.j2")

    def svg(self) -> str:
        """Both charts, side by side."""
        return self._render("tune.svg.j2")

    def _render(self, template: str) -> str:
        figure = curve_figure(self.points[0].output, [point.json() for point in self.points])
        lines = {key.policy.partition(",")[0].replace("lookahead(", "block "): key for key, _ in figure.rows}
        return (
            environment(words=lambda policy: policy_name(to_json(policy)))
            .get_template(template)
            .render(
                name=self.bundle.manifest.name,
                version=self.bundle.manifest.version,
                tuning=self,
                figure=figure,
                keys=list(lines.items()),
                rows=-(-len(lines) // 3),
            )
        )


def tune(
    bundle: Bundle,
    data: Sequence[Tensor | Sequence[Tensor]],
    *,
    agreement: float | None = 0.995,
    rms: float | None = None,
    output: str | None = None,
    blocks: Sequence[int] = BLOCKS,
    aheads: Sequence[int] = AHEADS,
    max_cost: float = 9.0,
    told: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005 - nobody has to listen
) -> Tuning:
    """Run the bundle's graphs on `data` under every setting up to `max_cost`, and compare with the offline answer.

    `data` are sequences as `export` takes them. A setting reaches what is wanted with `agreement` or more of the frames
    having the offline answer's largest element, and with `rms` or less for the root mean square of the difference, as a
    share of the answer's. The cheapest has the lowest cost, and among those the lowest latency. `output` is the one
    that is compared, the first of floats without. `told` hears how many of how many settings are done.

    Raises `PolicyError` for a bundle that has no look-ahead, `ExampleError` for data or an output that do not fit.
    """
    manifest = bundle.manifest
    if all(policy.kind != pb.POLICY_KIND_LOOKAHEAD for policy in manifest.policies):
        raise PolicyError(f"{manifest.name} does not allow lookahead, so that there is nothing to tune")
    signature = Signature.from_manifest(manifest)
    floats = [port.name for port in signature.outputs if port.dtype.is_floating_point]
    if not floats or (output is not None and output not in floats):
        raise ExampleError(f"{output or 'no output'!r} is no output of floats; there is {', '.join(floats) or 'none'}")
    streams = given_streams(signature, data)
    if not streams:
        raise ExampleError("no data; give at least one sequence")
    grid = [Lookahead(block, ahead) for block in sorted(set(blocks)) for ahead in sorted(set(aheads))]
    affordable: list[Setting] = [each for each in grid if (each.block + each.ahead) / each.block <= max_cost]
    settings = [each for each in (Carry(1), *affordable) if signature.fits(each)]
    if not any(isinstance(each, Lookahead) for each in settings):
        raise PolicyError(f"no setting has a cost of {max_cost:g} or less; allow more")
    done = iter(range(1, len(settings) + 1))
    with undisturbed():
        measured = measure(
            OnnxRuntime(bundle.path),
            signature,
            streams,
            settings,
            ragged=manifest.ragged,
            told=lambda: told(next(done), len(settings)),
        )
    chosen = output or floats[0]
    points = tuple(point for setting in measured for point in setting if point.output == chosen)
    good = [
        point
        for point in points
        if isinstance(point.policy, Lookahead)
        and (agreement is None or point.argmax_agreement >= agreement)
        and (rms is None or point.rms_relative_difference <= rms)
    ]
    wanted = [] if agreement is None else [f"agreement {100 * agreement:g} %"]
    wanted += [] if rms is None else [f"rms difference {100 * rms:g} %"]
    return Tuning(
        bundle,
        len(streams),
        sum(stream.frames for stream in streams),
        points,
        " and ".join(wanted),
        min(good, key=lambda point: (point.cost, point.latency_frames), default=None),
    )
