"""Text for the terminal."""

import re
from typing import Final

_HARMFUL: Final = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters, with ESC and CSI
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # these change the direction of the text
    "\ud800-\udfff"  # lone surrogates, which cannot be encoded
    "]"
)


def printable(text: str, *, keep: str = "") -> str:
    """The text with every control character replaced: they could move the cursor, or hide or forge output.

    Whatever comes from messages, logs or files passes through this before it is printed.

    Args:
        keep: control characters to keep, such as newlines.
    """
    return _HARMFUL.sub(lambda match: match.group() if match.group() in keep else "\N{REPLACEMENT CHARACTER}", text)
