"""What a command prints cannot control the terminal."""

import pytest

from shared.runtime.logs import printable


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\x1b]0;owned\x07", "�]0;owned�"),
        ("\x1b[2J", "�[2J"),
        ("\x9b2J", "�2J"),
        ("over\rwritten", "over�written"),
        ("a\x08b\x7fc\0", "a�b�c�"),
        ("line\u2028end", "line�end"),
        ("abc\u202edef", "abc�def"),
        ("\ud83d", "�"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("日本語 — naïve\xa0👩\u200d🌾", "日本語 — naïve\xa0👩\u200d🌾"),
    ],
)
def test_control_characters_are_replaced_and_text_is_kept(text: str, printed: str) -> None:
    assert printable(text, keep="\n\t") == printed
    assert "\n" not in printable(text)
