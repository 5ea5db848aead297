"""The interactive part of the explorer's page: tokens, experts, and the card of one expert."""

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
    """HTML of a document, from `trace.page`."""
    experts = traitlets.Unicode("").tag(sync=True)
    """HTML of the layer's experts, from `views`."""
    card = traitlets.Unicode("").tag(sync=True)
    """HTML of the chosen expert's card, from `views`."""
    by = traitlets.Unicode("expert").tag(sync=True)
    """Meaning of the tokens' colours, one of `page.BY`."""
    expert = traitlets.Int(None, allow_none=True).tag(sync=True)
    """The chosen expert, set by a click."""
