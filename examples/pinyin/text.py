"""Characters in, readings out: the tables around the network.

`python -m examples.pinyin.text SENTENCE` prints the numbers of its characters, one a line, as `carousel stream` reads
them.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from examples.pinyin import weights
from numpy.typing import NDArray

_BEGIN, _END, _UNKNOWN = "시", "끝", "<UNK>"  # the package's own marks
_TONES = ("\u0304", "\u0301", "\u030c", "\u0300")  # combining macron, acute, caron, grave


class Tables:
    """The package's numbering of characters and readings, and its dictionary of the readings of a character."""

    @cached_property
    def characters(self) -> dict[str, int]:
        table: dict[str, int] = weights.read("char2idx.pkl")
        return table

    @cached_property
    def readings(self) -> list[str]:
        """The classes in order, such as `zhong4`."""
        table: dict[str, int] = weights.read("class2idx.pkl")
        return sorted(table, key=table.__getitem__)

    @cached_property
    def dictionary(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = weights.read("digest_cedict.pkl")
        return table

    def encode(self, sentence: str) -> NDArray[np.int64]:
        """Numbers of a begin mark, the characters and an end mark, int64 `[len(sentence) + 2]`."""
        unknown = self.characters[_UNKNOWN]
        marked = [_BEGIN, *sentence, _END]
        return np.array([self.characters.get(character, unknown) for character in marked], dtype=np.int64)

    def ambiguous(self, sentence: str) -> list[int]:
        """Places of the characters with more than one reading."""
        return [i for i, character in enumerate(sentence) if len(self.dictionary.get(character, ())) > 1]

    def read(self, sentence: str, classes: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The reading of each character, such as `zhong4`; a character that the dictionary lacks stands for itself.

        `classes` has the network's choice for each frame of `encode(sentence)`, marks included. It decides where the
        dictionary has several readings.
        """
        found = []
        for character, chosen in zip(sentence, classes[1:-1], strict=True):
            known = self.dictionary.get(character, [character])
            found.append(known[0] if len(known) == 1 else self.readings[chosen])
        return found


def with_tone_mark(reading: str) -> str:
    """`zhong4` as people write it, `zhòng`; what does not end in a tone's number stays as it is."""
    if not (reading[:-1].isalpha() or "u:" in reading) or reading[-1] not in "12345":
        return reading
    syllable, tone = reading[:-1].replace("u:", "ü").lower(), int(reading[-1])
    if tone == 5:
        return syllable
    # a and e always take the mark, o does in ou, otherwise the last vowel does
    place = next((syllable.index(v) for v in ("a", "e", "ou") if v in syllable), None)
    if place is None:
        place = max((i for i, letter in enumerate(syllable) if letter in "iouü"), default=0)
    return unicodedata.normalize("NFC", syllable[: place + 1] + _TONES[tone - 1] + syllable[place + 1 :])


def read_sentences() -> list[str]:
    """The sentences of the example, one a line."""
    return Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").split()


if __name__ == "__main__":
    print(*Tables().encode("".join(sys.argv[1:])), sep="\n")
