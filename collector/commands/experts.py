"""`collector experts` selects experts of a run, and writes them as a file or in the form of another program."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from collector.commands.arguments import RunPath

if TYPE_CHECKING:
    from collector.query.expert_sets import ExpertSets
    from collector.query.warehouse import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Select experts, and keep them: `collector experts RUN --select language_experts --save SET.json`.

    A file of sets remembers the model, the run and the SQL. `collector intervene RUN --arms SET.json` measures what the
    model loses without each set. --to prints one set as another program reads it:

    easysteer: its configuration that switches the experts off. esft: the expert configuration of ESFT, which trains
    them. llama.cpp: the option --omit-experts of a pull request (15165), for a set that is the same in every layer.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store."""
    select: str
    """Which experts: a name of queries/arms/ (every_expert, language_experts, super_experts, most_loaded, dead), SQL
    over the run's views and queries or a file of it (.sql), or a saved file (.json). SQL returns layer, expert, and
    where they matter stack, and arm or label for several sets."""
    save: Path | None = None
    """The file to write, which ends with .json."""
    to: Literal["easysteer", "esft", "llama.cpp"] | None = None
    """Print one set for this program, instead of the list of sets."""
    name: str | None = None
    """The set to print; also the name of a set whose SQL gives none (default: that of the file, or `experts`)."""

    def __post_init__(self) -> None:
        """Rejects a file that `collector intervene` would not take for sets."""
        if self.save is not None and self.save.suffix != ".json":
            raise ValueError(f"--save takes a file that ends with .json, got {self.save}")

    def run(self) -> int:
        """Writes the file, and prints the sets or one of them.

        Raises:
            FileNotFoundError: there is no run, or no such file.
            ValueError: the SQL is not usable, or the program cannot have such a set.
        """
        from collector.look.export.experts import written
        from collector.query import warehouse
        from collector.query.expert_sets import select_sets
        from collector.store.run_directory import RunDirectory

        with warehouse.one_line_errors():
            run = warehouse.open_run(self.run_)
            unnamed = self.name or (self.save.stem if self.save else "experts")
            found = select_sets(run, RunDirectory(self.run_), self.select, name=unnamed)
        said = self._list(run, found) if self.to is None else written(run, found.sets[self._chosen(found)], self.to)
        if self.save is not None:
            _replace(self.save, found.to_json())
        sys.stdout.write(said)
        return 0

    def _chosen(self, found: ExpertSets) -> str:
        """The name of the set to print."""
        names = ", ".join(found.sets)
        if self.name is not None and self.name not in found.sets:
            raise ValueError(f"there is no set {self.name!r}; there are {names}")
        if self.name is None and len(found.sets) > 1:
            raise ValueError(f"--to {self.to} takes one set: choose it with --name, of {names}")
        return self.name or next(iter(found.sets))

    def _list(self, run: Run, found: ExpertSets) -> str:
        of = len(run.info["layers"])
        lines = [
            f"{name}: {len(rows)} experts in {len({(row['stack'], row['layer']) for row in rows})} of {of} layers\n"
            for name, rows in found.sets.items()
        ]
        return "".join([*lines, *([] if self.save is None else [f"{self.save}\n"])])


def _replace(path: Path, content: str) -> None:
    """Writes a file that appears as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
