"""How long steps report where they are; the command line renders it."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how much of it is done, and how much there is."""

    def __call__(self, description: str, done: int, total: int, /) -> None:
        """Report."""


def silent(description: str, done: int, total: int, /) -> None:
    """Report nothing."""
