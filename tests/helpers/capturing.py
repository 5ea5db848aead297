"""A capture of routers alone, as the replica sets it up."""

from __future__ import annotations

from collector.capture.hooks import Capture
from collector.capture.routing import RoutingRecorder
from collector.config import CaptureConfig


def router_capture(model, routers, *, store=(), device=None) -> Capture:
    """A capture whose `run(...).wait()[0]` has a `LayerDecision` per router."""
    config = CaptureConfig(store=store)
    return Capture(model, [RoutingRecorder(model, routers, config)], device=device)
