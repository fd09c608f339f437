"""Text out of token bytes as they come: whole characters only, and stop strings cut off."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the bytes of tokens and gives back the text that is certain.

    Bytes of an unfinished character wait for the rest, and text that may be the start of a stop string
    waits until it is clear. The stop string that is complete first ends the text, in front of it, and
    is named in `stopped`. However the bytes are cut into tokens, the text is the same.
    """

    def __init__(self, stop: str | Sequence[str] = ()):
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stops:
            raise ValueError("an empty stop string would stop every text at its start")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None

    def push(self, token_bytes: bytes) -> str:
        """The new text that is certain once `token_bytes` has come; empty after a stop string."""
        return self._take(self._decoder.decode(token_bytes), final=False)

    def finish(self) -> str:
        """The text still held back; bytes that are not a whole character become U+FFFD."""
        return self._take(self._decoder.decode(b"", final=True), final=True)

    def _take(self, new: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + new
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = 0 if final else self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
