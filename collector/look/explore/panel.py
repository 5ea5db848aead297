"""The part of the explorer's page that can be pointed at: tokens, experts, one expert's card."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from collector.look.trace import page

_FOLDER = Path(__file__).parent


class Panel(anywidget.AnyWidget):
    """Three pieces of HTML whose buttons choose an expert."""

    _esm = page.JS + (_FOLDER / "panel.js").read_text(encoding="utf-8")
    _css = page.CSS + (_FOLDER / "panel.css").read_text(encoding="utf-8")
    tokens = traitlets.Unicode("").tag(sync=True)
    """A document, from `trace.page`."""
    experts = traitlets.Unicode("").tag(sync=True)
    """The experts of the layer, from `views`."""
    card = traitlets.Unicode("").tag(sync=True)
    """What is told of the chosen expert, from `views`."""
    by = traitlets.Unicode("expert").tag(sync=True)
    """What the colours of tokens stand for, of `page.BY`."""
    expert = traitlets.Int(None, allow_none=True).tag(sync=True)
    """The chosen expert; what a click sets."""
