"""Keeps what only observes a run, such as metrics and progress, from ending it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Harmless:
    """Context in which any error ends the context alone; the first one is told.

    `KeyboardInterrupt` and `SystemExit` pass, because they are meant for the run.
    """

    def __init__(self, what: str, tell: Callable[[str], object]) -> None:
        """Starts with nothing told.

        Args:
            what: the subject of the message, in the plural.
            tell: takes the message; its own errors are dropped.
        """
        self._what = what
        self._tell = tell
        self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self._told:
            self._told = True
            with contextlib.suppress(Exception):
                self._tell(f"{self._what} fail, and the run goes on without them ({type(error).__name__}: {error})")
        return True
