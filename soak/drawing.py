"""Memory over time, as a drawing like the benchmark's."""

from pathlib import Path

from bench.plots import Drawing, Key, render
from soak.memory import FLAT, Memory

from carousel_export.charts import Axis, Chart, Line


def draw(memory: Memory, file: Path) -> None:
    """What was resident, and the band in which it has to stay after the warm-up."""
    band = [
        Line([(memory.warm_up_minutes, edge), (memory.minutes, edge)], 1, dashed=True)
        for edge in (memory.base_mb * (1 - FLAT), memory.base_mb * (1 + FLAT))
    ]
    x, y = Axis.linear("minutes", memory.minutes), Axis.linear("MB resident", memory.highest_mb * 1.2)
    chart = Chart("memory", x, y, [Line(memory.rss_mb, 0), *band])
    keys = [Key("server", 0), Key(f"± {FLAT:.0%} of the first minute after the warm-up", 1, dashed=True)]
    title = "a server's memory under sessions that are opened, streamed, left alone and forgotten"
    file.write_text(render(Drawing(title, [chart], keys)), encoding="utf-8")
