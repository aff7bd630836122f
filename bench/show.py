"""The results on the terminal."""

from collections.abc import Iterable

from bench.findings import Results
from bench.tables import Table as Text
from rich.console import Console
from rich.table import Table

# What the widest table takes, wherever the output goes.
_WIDTH = 140


def show(results: Results, shown: Iterable[Text]) -> None:
    console = Console(width=max(_WIDTH, Console().width))
    for each in shown:
        table = Table(title=each.title, title_justify="left")
        for number, column in enumerate(each.columns):
            table.add_column(column, justify="left" if number < each.words else "right", no_wrap=True)
        for row in each.rows:
            table.add_row(*row)
        console.print(table)
    for name, note in results.notes.items():
        console.print(f"{name}: {note}")
    console.print(f"took {results.settings['took_s']:.0f} s")
