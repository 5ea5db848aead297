"""A document token by token: which expert each router chose, for a text given now or a document of a run.

`collecting` sends a text through a model, `reading` reads a document of a run, `printing` and `page` show it;
`pieces` and `palette` say how tokens are written and coloured wherever that is.
"""

from __future__ import annotations

from collector.look.trace.reading import Decision, Router, Token, Trace, read

__all__ = ["Decision", "Router", "Token", "Trace", "read"]
