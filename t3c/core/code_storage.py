"""How the codes of one weight are stored where profiles want them in several widths."""

from enum import StrEnum


class CodeStorage(StrEnum):
    """One array for all widths, or one for each.

    Every profile reads only its own bytes either way; what differs is the size of the file and how
    well each width is rounded.
    """

    NESTED = "nested"
    """Dense codes of 8 bits contain those of 4: the smaller file. Each width gives up a little."""
    INDEPENDENT = "independent"
    """Each width is rounded for itself, exactly as if there were no other: the larger file."""


def parse_code_storage(text: str) -> CodeStorage:
    """The way of storing codes of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    try:
        return CodeStorage(text)
    except ValueError:
        known = ", ".join(map(repr, map(str, CodeStorage)))
        raise ValueError(f"codes is {text!r}; allowed are {known}") from None
