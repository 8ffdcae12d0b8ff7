"""Ends a text at a stop sequence, wherever the pieces in which it arrives are cut."""

from collections.abc import Sequence


class StopScanner:
    """Passes a text on piece by piece, up to the first stop sequence.

    A piece that ends with the beginning of a stop sequence is held back until it is clear which of the two it is.

    Attributes:
        stopped: a stop sequence was found; nothing is passed on any more.
    """

    __slots__ = ("_held", "_longest", "_sequences", "stopped")

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(one for one in sequences if one)
        self._longest = max(map(len, self._sequences), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What may be passed on after this piece."""
        if self.stopped:
            return ""
        if not self._sequences:
            return piece
        text = self._held + piece
        found = [place for one in self._sequences if (place := text.find(one)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop sequence."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(one.startswith(end) for one in self._sequences):
                return length
        return 0
