"""Commands that show routing: `collector show`, `collector profile`, `collector trace`, `collector explore`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from collector.commands.arguments import RunPath
from collector.config import CaptureConfig, ModelConfig, Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print the top expert of every label and layer, of one run or of two side by side."""

    run_: RunPath
    """The run directory."""
    beside: str | None = None
    """Another run to show next to it, for example of the same model with random weights."""
    labels: tuple[str, ...] | None = None
    """Labels to show (default: all)."""
    by: str = "label"
    """What to group by: label (as recorded), source, script, length, position, token_class, span, role or phase."""

    def run(self) -> int:
        """Prints the table."""
        from collector.look import terminal
        from collector.query import warehouse

        beside = warehouse.open_run(self.beside, by=self.by) if self.beside else None
        terminal.top_experts_by_layer(warehouse.open_run(self.run_, by=self.by), self.labels, beside)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Print all that a run knows of one expert, as JSON: labels, tokens, contexts, contribution, nearest experts.

    Labels have intervals and a test against the other labels. Parts that need a recorder the run was collected without
    are null: see `--record` of `collector collect`, and `collector weights`.
    """

    run_: RunPath
    """The run directory."""
    layer: int
    """The model's own number of the layer."""
    expert: int
    """The expert's number."""
    stack: str | None = None
    """The router's stack, where a layer has several routers."""
    n: int = 10
    """Most items of each list."""
    by: str = "label"
    """What labels are: label (as recorded), source, script or length."""
    resamples: int = 1000
    """Bootstrap samples of the intervals, and shuffles of the test."""
    html: str | None = None
    """Also write the expert's card, as the explorer shows it, to this file."""

    def run(self) -> int:
        """Prints the profile, and writes the card if requested."""
        import json

        from collector.look.explore import views
        from collector.look.profile import profile
        from collector.query import warehouse

        run = warehouse.open_run(self.run_, by=self.by)
        found = profile(
            run, layer=self.layer, expert=self.expert, stack=self.stack, n=self.n, resamples=self.resamples
        )  # fmt: skip
        if self.html is not None:
            shown = views.card_page(run, stack=found["stack"], layer=self.layer, expert=self.expert)
            Path(self.html).write_text(shown, encoding="utf-8")
        sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Run a model over one text and show which expert each router chose for each token.

    The text is printed once per router, each token in the colour of its expert and followed by the expert's number.
    A table then gives, token by token, the expert with the highest weight, that weight and the router's entropy.

    With `--edit` the text runs a second time with changed routing, and the most probable next tokens of both are shown.
    Operations: drop (weight 0), drop_renorm (its weight goes to the others), replace (the next expert takes its place),
    scale (weight times value), bias (logit plus value standard deviations), force (always chosen).
    """

    text: tyro.conf.Positional[str]
    """The text; `-` reads it from standard input."""
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    layers: tuple[int, ...] | None = None
    """Router layers to show, numbered as in the model (default: all)."""
    stacks: tuple[Stack, ...] | None = None
    """Which routers to show: `encoder`, `decoder` or both (default: as `collector collect` records them)."""
    max_length: int = 512
    """Maximum number of tokens. A longer text is truncated, and the title says so."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. `auto` takes a GPU if torch sees one."""
    edit: tuple[str, ...] = ()
    """Edits of the routing, such as 'layer=1 expert=9 operation=scale value=2' 'layer=4 expert=3 operation=drop'."""
    position: tuple[int, ...] | None = None
    """Tokens at which the edits act, numbered from 0 with special tokens (default: all)."""
    html: str | None = None
    """Also write a self-contained page to this file; it shows all chosen experts of the token at the pointer."""

    def run(self) -> int:
        """Prints the trace, and writes the page if requested."""
        from collector.look import terminal
        from collector.look.trace import collecting, page, printing, read

        text = sys.stdin.read() if self.text == "-" else self.text
        capture = CaptureConfig(layers=self.layers, stacks=self.stacks, max_length=self.max_length)
        if self.edit:
            return self._intervene(text, capture)
        if self.position is not None:
            raise ValueError("--position says where edits act, and there is no --edit")
        with collecting.collected(text, self.model, capture, self.device) as run:
            trace, title = read(run), f"{terminal.model(run.info)}: {terminal.routers(run.info['layers'])}"
            cut = f"; cut after {self.max_length} tokens" if collecting.was_cut(run) else ""
        printing.show(trace, terminal.console(), title + cut)
        if self.html is not None:
            Path(self.html).write_text(page.page(trace, title + cut), encoding="utf-8")
        return 0

    def _intervene(self, text: str, capture: CaptureConfig) -> int:
        """Prints both traces and the next tokens, and writes the page if requested."""
        from collector.look import terminal
        from collector.look.trace import intervening, page, printing
        from collector.models.edits import parse

        edits = [parse(each) for each in self.edit]
        outcome = intervening.compare(text, self.model, capture, self.device, edits, self.position)
        told, title = "; ".join(self.edit), self.model.model
        if self.position is not None:
            told += f" at {', '.join(map(str, self.position))}"
        cut = f"; cut after {self.max_length} tokens" if outcome.was_cut else ""
        printing.show_outcome(outcome, told, terminal.console(), title + cut)
        if self.html is not None:
            Path(self.html).write_text(page.page_of_outcome(outcome, told, title + cut), encoding="utf-8")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore:
    """Explore a run in the browser: languages, layers, documents token by token, experts.

    The server listens on this machine only. The URL that it prints contains the access token.
    """

    run_: RunPath
    """The run directory."""
    port: int = 0
    """Port of the server (default: any free port)."""
    browser: bool = True
    """Open the page in the browser."""

    def run(self) -> int:
        """Serves until Ctrl-C."""
        from collector.look.explore import serving

        serving.serve(self.run_, self.port, browser=self.browser)
        return 0
