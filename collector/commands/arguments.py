"""Arguments shared by several commands."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

RunPath = Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
"""The run's folder or URL, called RUN on the command line."""

RowFormat = Literal["table", "csv", "json", "parquet"]
"""How rows are written to standard output."""
