"""The interface of parallel.ranks.Ranks that this folder uses, which must not import it."""

from collections.abc import Callable
from typing import Any, Protocol


class RankGroup(Protocol):
    """A rank and its communication with the others. Tests implement it with threads and pipes."""

    @property
    def rank(self) -> int:
        """Return the index of this rank."""

    @property
    def size(self) -> int:
        """Return the number of ranks."""

    @property
    def first(self) -> bool:
        """Return whether this is rank 0."""

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Run work() on rank 0 only, and return its result or raise its InputError everywhere."""

    def all(self, value: Any) -> list[Any]:
        """Return [value of rank 0, value of rank 1, ...] on every rank."""
