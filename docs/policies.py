"""Draws policies.svg: what each policy's directions see when the block 4–7 is answered. Run: python docs/policies.py"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

FRAMES, BLOCK, AHEAD = 13, range(4, 8), range(8, 11)
LEFT, STEP, BOX = 196, 42, 30
TOP, HEIGHT, WIDTH = 58, 142, 960
RIGHT = LEFT + FRAMES * STEP + 22

# The picture brings its own background, so that it is legible wherever the page's colours and the reader's differ.
STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --now: #0969da; --seen: #b6d6f6;
      --forward: #b35900; --backward: #8250df; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --now: #388bfd; --seen: #1a3d6b;
        --forward: #f0a04b; --backward: #be8fff; }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
text { fill: var(--ink); }
.paper { fill: var(--paper); stroke: var(--line); }
.rule { stroke: var(--line); }
.name { font-size: 17px; font-weight: 600; }
.soft { fill: var(--soft); }
.small { font-size: 12px; }
.mid { text-anchor: middle; }
.frame { fill: none; stroke: var(--line); stroke-width: 1.5; }
.frame.now { fill: var(--now); stroke: var(--now); }
.frame.seen { fill: var(--seen); stroke: var(--seen); }
text.now { fill: #ffffff; font-weight: 600; }
.forward, .backward { fill: none; stroke-width: 2; }
.forward { stroke: var(--forward); }
.backward { stroke: var(--backward); }
.dropped { stroke-dasharray: 5 4; }
.tip.forward { fill: var(--forward); }
.tip.backward { fill: var(--backward); }
text.forward { fill: var(--forward); stroke: none; }
text.backward { fill: var(--backward); stroke: none; }
"""


def left_of(frame: float) -> float:
    return LEFT + frame * STEP


def right_of(frame: float) -> float:
    return left_of(frame) + BOX


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x}" y="{y}">{escape(words)}</text>'


def frames(y: float, now: range, seen: range = range(0)) -> Iterator[str]:
    for i in range(FRAMES):
        state = "now" if i in now else "seen" if i in seen else ""
        yield f'<rect class="frame {state}" x="{left_of(i)}" y="{y}" width="{BOX}" height="{BOX}" rx="5"/>'
        yield text(left_of(i) + BOX / 2, y + 20, str(i), f"mid {state or 'soft'}")


def arrow(style: str, start: float, end: float, y: float, *, tip: bool = True) -> Iterator[str]:
    """A level line; with a tip it ends in an arrow head."""
    way = 1 if end > start else -1
    yield f'<path class="{style}" d="M{start} {y}H{end - way * 6 if tip else end}"/>'
    if tip:
        kind = style.split(maxsplit=1)[0]
        yield f'<path class="tip {kind}" d="M{end} {y}l{-9 * way} -5v10z"/>'


def zero(style: str, x: float, y: float) -> Iterator[str]:
    """Where a direction starts from a zero state."""
    yield f'<circle class="{style}" cx="{x}" cy="{y}" r="7"/>'
    yield text(x, y + 4, "0", f"small mid {style}")


def panel(index: int, name: str, lines: list[str], latency: list[str]) -> Iterator[str]:
    y = TOP + index * HEIGHT
    if index:
        yield f'<path class="rule" d="M24 {y - 6}H{WIDTH - 24}"/>'
    yield text(24, y + 50, name, "name")
    for i, line in enumerate(lines):
        yield text(24, y + 70 + 17 * i, line, "small soft")
    for i, line in enumerate(latency):
        yield text(RIGHT, y + 58 + 17 * i, line, "small")


def carried_in(y: float) -> Iterator[str]:
    yield from arrow("forward", right_of(2), left_of(BLOCK.start), y, tip=False)
    yield text(right_of(2) - 4, y - 8, "h, c carried in", "small mid forward")


def carried_on(y: float) -> Iterator[str]:
    yield f'<circle class="tip forward" cx="{right_of(BLOCK[-1]) + 6}" cy="{y}" r="4"/>'


def causal(y: float) -> Iterator[str]:
    yield from frames(y, BLOCK)
    yield from carried_in(y - 14)
    yield from arrow("forward", left_of(4), right_of(7), y - 14)
    yield from carried_on(y - 14)
    yield text(right_of(7) + 16, y - 10, "carried on", "small forward")
    yield text(left_of(4), y + BOX + 20, "no backward direction", "small soft")


def carry(y: float) -> Iterator[str]:
    yield from frames(y, BLOCK)
    yield from carried_in(y - 14)
    yield from arrow("forward", left_of(4), right_of(7), y - 14)
    yield from carried_on(y - 14)
    yield text(right_of(7) + 16, y - 10, "carried on", "small forward")
    low = y + BOX + 12
    # Backward left its state at frame 0 of the block before, and takes it up at the far end of this one.
    yield from arrow("backward dropped", right_of(3), left_of(0), low)
    yield from arrow("backward", right_of(7), left_of(4), low)
    bottom = low + 24
    x0, x1 = left_of(0), right_of(7) + 10
    yield (
        f'<path class="backward" d="M{x0} {low + 6}q0 {bottom - low - 6} 14 {bottom - low - 6}'
        f'H{x1 - 14}q14 0 14 {low - bottom + 12}V{low}H{right_of(7)}"/>'
    )
    yield text(x1 + 10, bottom, "starts from the state of frame 0: not what follows frame 7", "small backward")


def lookahead(y: float) -> Iterator[str]:
    yield from frames(y, BLOCK, AHEAD)
    yield from carried_in(y - 14)
    yield from arrow("forward", left_of(4), right_of(7), y - 14, tip=False)
    yield from carried_on(y - 14)
    yield from arrow("forward dropped", right_of(7) + 12, right_of(10), y - 14)
    yield text(right_of(7) + 2, y - 24, "carried on from here", "small mid forward")
    yield text(right_of(10) + 8, y - 10, "dropped", "small forward")
    low = y + BOX + 14
    yield from zero("backward", right_of(10) + 4, low)
    yield from arrow("backward dropped", right_of(10) - 3, left_of(8), low, tip=False)
    yield from arrow("backward", right_of(7) + 6, left_of(4), low)
    yield text(right_of(10) + 18, low + 4, "starts at zero", "small backward")
    yield text(left_of(4), low + 24, "the next layer sees frames 4 to 10 of both directions", "small soft")


def full(y: float) -> Iterator[str]:
    yield from frames(y, range(FRAMES))
    yield from zero("forward", left_of(0) - 5, y - 14)
    yield from arrow("forward", left_of(0) + 4, right_of(FRAMES - 1), y - 14)
    low = y + BOX + 14
    yield from zero("backward", right_of(FRAMES - 1) + 5, low)
    yield from arrow("backward", right_of(FRAMES - 1) - 4, left_of(0), low)


def picture() -> str:
    panels = [
        (causal, "causal", ["any cut gives", "the same answer"], ["answered", "as it arrives"]),
        (carry, "carry(4)", ["both directions'", "states fed back"], ["answered when", "the block is full"]),
        (
            lookahead,
            "lookahead(4, 3)",
            ["right context", "of bounded length"],
            ["answered 3 frames", "after the block is full"],
        ),
        (full, "full", ["the offline answer"], ["answered", "at the end"]),
    ]
    height = TOP + len(panels) * HEIGHT - 18
    label = "What forward and backward directions see under each policy"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
    ]
    x = 24.0
    for mark, words, room in (
        ("now", "frames answered", 150), ("seen", "frames ahead, seen and not yet answered", 290),
        ("", "other frames", 0),
    ):  # fmt: skip
        parts.append(f'<rect class="frame {mark}" x="{x}" y="20" width="16" height="16" rx="4"/>')
        parts.append(text(x + 24, 33, words, "small soft"))
        x += room
    for style, words, at in (("forward", "forward", x + 140), ("backward", "backward", x + 240)):
        parts += arrow(style, at, at + 26, 28)
        parts.append(text(at + 34, 33, words, "small soft"))
    for i, (draw, name, lines, latency) in enumerate(panels):
        parts += panel(i, name, lines, latency)
        parts += draw(TOP + i * HEIGHT + 48)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("policies.svg").write_text(picture(), encoding="utf-8")
