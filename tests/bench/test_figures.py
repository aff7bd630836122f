"""The documents' figures are the results'."""

import re

import pytest
from bench import figures
from bench.client.phase import Measured
from bench.findings import Point
from bench.targets import Target


def _measured(chunks_per_s: float) -> Measured:
    return Measured(chunks_per_s, 1.0, 2.0, 100.0, 50.0, 0.0, 10.0, 0.0)


def test_every_figure_in_the_documents_has_a_name_that_is_known() -> None:
    """A document with a figure of an unknown name is refused, and ours have none."""
    for document in figures.DOCUMENTS:
        found = re.findall(r"<!-- figures: (\S+) -->", document.read_text(encoding="utf-8"))
        assert found
        assert set(found) <= figures.FIGURES.keys()
    with pytest.raises(SystemExit, match="no figure 'x'"):
        figures.written("<!-- figures: x -->\n<!-- end of figures -->")


def test_ratios_are_taken_within_a_round() -> None:
    """Two points are compared round by round, so that a slow round of the machine counts for neither."""
    ours, theirs = Point("", "A", "a", 1), Point("", "A", "b", 1)
    for fast in (1.0, 10.0, 4.0):
        ours.rounds.append(_measured(300 * fast))
        theirs.rounds.append(_measured(200 * fast))
    assert ours.over(theirs) == pytest.approx(1.5)


def test_a_target_that_was_not_measured_is_not_reached() -> None:
    """Without a measurement a target is neither reached nor missed; with one it is what the limit says."""
    assert Target("", "", True, 1.0, "", None).reached is None
    assert Target("", "", True, 1.0, "", 1.1).reached is False
    assert Target("", "", False, 1.0, "", 1.1).reached is True
