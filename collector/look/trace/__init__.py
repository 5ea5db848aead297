"""Shows a document token by token, with the expert that each router chose, for a new text or a document of a run.

`collecting` runs a model over a text, `intervening` a second time with edits of its routing, `reading` reads a document
of a run, `printing` and `page` show it; `pieces` and `palette` define how tokens are written and coloured.
"""

from __future__ import annotations

from collector.look.trace.reading import Decision, Router, Token, Trace, read

__all__ = ["Decision", "Router", "Token", "Trace", "read"]
