"""Text out of bytes, with a defined outcome for what is not UTF-8 or not Unicode."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .document import Skipped

ENCODING_ERRORS = ("strict", "replace", "skip")

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Decoder:
    """What becomes of bytes that are not UTF-8, and of lone surrogates.

    errors: "strict" raises a ValueError, "replace" puts U+FFFD in their place, "skip" leaves the document out.
    skipped: the documents left out so far.
    """

    errors: str = "strict"
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.errors not in ENCODING_ERRORS:
            raise ValueError(
                f"encoding_errors must be one of {', '.join(ENCODING_ERRORS)}, got {self.errors!r}."
            )

    def decode(self, raw: bytes, name: str, unit: str, cure: str) -> str | None:
        """Return the text, without its byte order mark, or None where the document is left out.

        Args:
            name: of the document.
            unit: what `raw` is: "file", "line" or "row"; of a file, an error names the line.
            cure: what the error tells the user to do.
        Raises:
            ValueError: `raw` is not UTF-8 and `errors` is "strict".
        """
        try:
            return raw.decode("utf-8-sig", "replace" if self.errors == "replace" else "strict")
        except UnicodeDecodeError as error:
            # The codec counts from behind the byte order mark.
            start = error.start + len(raw) - len(error.object)
            line = raw.count(b"\n", 0, start) + 1
            place = f", line {line}" if unit == "file" else f" of the {unit}"
            self._refuse(name, f"is not UTF-8 (byte 0x{raw[start]:02x} at offset {start}{place})", cure)
            return None

    def check(self, text: str, name: str) -> str | None:
        """Return the text as Unicode, or None where it holds lone surrogates and the document is left out.

        Raises:
            ValueError: it holds lone surrogates and `errors` is "strict".
        """
        found = _SURROGATES.search(text)
        if found is None:
            return text
        if self.errors == "replace":
            return _SURROGATES.sub("\ufffd", text)
        what = f"holds a lone surrogate (\\u{ord(found[0]):04x} at character {found.start()} of the text)"
        self._refuse(name, what, "it is half of a character: write both halves, or \\ufffd.")
        return None

    def _refuse(self, name: str, what: str, cure: str) -> None:
        if self.errors == "strict":
            raise ValueError(f"{name} {what}; {cure}")
        self.skipped.append(Skipped(name, what))


def iconv(path: Path) -> str:
    """Return how to make UTF-8 of a file."""
    return (
        f"convert it first, for example with: iconv -f latin1 -t utf-8 {path} > {path.stem}.utf8{path.suffix}"
    )
