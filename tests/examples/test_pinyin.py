"""The pinyin example says what the published package says."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.pinyin import model, weights
from examples.pinyin.text import Tables, read_sentences, with_tone_mark
from numpy.typing import NDArray


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Tables()


@pytest.fixture(scope="module")
def network() -> model.Pinyin:
    torch.set_num_threads(1)
    return model.load()


@pytest.fixture(scope="module")
def published() -> Any:
    """The package's own inference in NumPy, which also keeps the scores it chose by."""
    from g2pM import G2pM  # type: ignore[import-untyped]  # the package has no types

    class Published(G2pM):  # type: ignore[misc]  # as above
        def fc_layer(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
            self.scores = np.asarray(super().fc_layer(inputs))
            return self.scores

    return Published()


# The package leaves the files it reads open, and reads its weights under a module name that NumPy has left.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:numpy.core.multiarray is deprecated:DeprecationWarning")
def test_module_says_what_the_package_says(tables: Tables, network: model.Pinyin, published: Any) -> None:
    """On every sentence the module's readings are the package's, and its scores are within 1e-5 of the package's.

    The package computes in float64 from the first state on, and scores reach 150, where a step of float32 is 1.5e-5: so
    scores are compared in float64, and the readings in the float32 that is exported.
    """
    exact = model.load().double()
    seen, largest = 0, 0.0
    for sentence in read_sentences():
        characters = torch.from_numpy(tables.encode(sentence))[None]
        with torch.inference_mode():
            chosen = network(characters)[0].argmax(-1).numpy()
            scores = exact.scores(characters)[0, 1:-1].numpy()
        assert tables.read(sentence, chosen) == published(sentence, char_split=True), sentence
        places = tables.ambiguous(sentence)
        largest = max(largest, float(np.abs(scores[places] - published.scores).max()))
        seen += len(places)
    assert seen > 1000
    assert largest <= 1e-5


def test_sentences_are_many_and_different(tables: Tables) -> None:
    """At least 300 sentences, none twice, each with an ambiguous character."""
    sentences = read_sentences()
    assert len(sentences) >= 300
    assert len(set(sentences)) == len(sentences)
    assert all(tables.ambiguous(sentence) for sentence in sentences)


def test_pickle_that_would_run_code_is_refused() -> None:
    """A pickle that names a function is refused, and the function does not run."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("must-not-appear",)

    with pytest.raises(pickle.UnpicklingError, match="mkdir: only NumPy arrays are read"):
        weights.loads(pickle.dumps(Hostile()))
    assert not Path("must-not-appear").exists()


def test_pickled_arrays_of_this_numpy_are_read() -> None:
    """Arrays pickled by the NumPy installed here come back equal."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(weights.loads(pickle.dumps({"w": array}, protocol=3))["w"], array)


@pytest.mark.parametrize(
    ("reading", "written"),
    [
        ("zhong4", "zhòng"), ("hao3", "hǎo"), ("dou1", "dōu"), ("jiu4", "jiù"), ("gui4", "guì"), ("xue2", "xué"),
        ("lu:3", "lǚ"), ("nu:e4", "nüè"), ("le5", "le"), ("n2", "ń"),
        ("，", "，"), ("A", "A"), ("3", "3"), ("xx5", "xx"),
    ],
)  # fmt: skip
def test_tone_marks(reading: str, written: str) -> None:
    """A numbered reading is written with its tone mark on the right vowel; anything else stays as it is."""
    assert with_tone_mark(reading) == written
