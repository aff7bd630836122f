"""Tables on the terminal."""

from collections.abc import Iterable

from bench.findings import Results
from bench.tables import Table
from rich import table
from rich.console import Console

# What the widest table takes, wherever the output goes.
_WIDTH = 140


def show(results: Results, tables: Iterable[Table]) -> None:
    """The tables, and what is to be said beside them."""
    print_tables(tables)
    for name, note in results.notes.items():
        print(f"{name}: {note}")
    print(f"took {results.settings['took_s']:.0f} s")


def print_tables(tables: Iterable[Table]) -> None:
    console = Console(width=max(_WIDTH, Console().width))
    for each in tables:
        drawn = table.Table(title=each.title, title_justify="left")
        for number, column in enumerate(each.columns):
            drawn.add_column(column, justify="left" if number < each.words else "right", no_wrap=True)
        for row in each.rows:
            drawn.add_row(*row)
        console.print(drawn)
