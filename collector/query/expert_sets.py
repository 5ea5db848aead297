"""Sets of experts as files: what SQL selected, from which run of which model.

A file is JSON with named sets. A set's rows are experts (stack, layer, expert) with whatever else the SQL returned of
them. `collector intervene` takes each set for an arm that drops its experts; other programs take a set in their own
forms (`collector.look.export.experts`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.models.edits import Arm, Edit, read
from collector.query.expert_sql import named_arms, named_sql, rows_of
from collector.store.commits import Attempts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from collector.query.warehouse import Run
    from collector.store.run_directory import RunDirectory

_KIND = "expert sets 1"
"""Kind and version of the file."""
_MODEL = ("model", "revision", "weights")
"""Settings of a run that say which model its experts are of; quantization and precision change none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSets:
    """Named sets of experts of one model."""

    model: Mapping[str, Any]
    """Its name, revision and weights, as in the run's settings."""
    run: Mapping[str, str]
    """What the SQL read: the hash of the run's plan, and a digest of its commits."""
    select: str | None
    """The name or file of the SQL, if it has one."""
    sql: str
    sets: Mapping[str, Sequence[Mapping[str, Any]]]
    """Rows by name, each with at least stack, layer and expert; sorted by these."""

    def to_json(self) -> str:
        """Returns the content of a file, one row on a line."""
        head = {"kind": _KIND, "model": self.model, "run": self.run, "select": self.select, "sql": self.sql}
        told = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        sets = ",\n".join(
            f"  {json.dumps(name, ensure_ascii=False)}: [\n"
            + ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in rows)
            + "\n  ]"
            for name, rows in self.sets.items()
        )
        return f'{told},\n "sets": {{\n{sets}\n }}\n}}\n'

    def check(self, run: Run) -> None:
        """Checks that a run has these experts.

        Raises:
            ValueError: it is a run of another model, or it did not record one of them.
        """
        for name in _MODEL:
            ours, theirs = self.model.get(name), run.info["config"].get(name)
            if ours != theirs and not (name == "revision" and None in (ours, theirs)):
                raise ValueError(f"the expert sets are of {name} {ours}, the run of {name} {theirs}")
        sizes = {(one["stack"], one["layer"]): one["n_experts"] for one in run.info["layers"]}
        for row in (row for rows in self.sets.values() for row in rows):
            stack, layer, expert = (row[key] for key in ("stack", "layer", "expert"))
            if (stack, layer) not in sizes:
                known = ", ".join(f"{stack} {layer}" for stack, layer in sizes)
                raise ValueError(f"the run has no router in {stack} layer {layer}; it has {known}")
            if expert >= sizes[stack, layer]:
                raise ValueError(
                    f"{stack} layer {layer} of the run has experts 0 to {sizes[stack, layer] - 1}, not {expert}"
                )

    def arms_for(self, run: Run) -> list[Arm]:
        """Returns an arm for each set, which drops its experts.

        Raises:
            ValueError: for the same reasons as `check`.
        """
        self.check(run)
        return [Arm(name=name, edits=tuple(map(_dropped, rows))) for name, rows in sorted(self.sets.items())]


def select_sets(run: Run, directory: RunDirectory, select: str, *, name: str) -> ExpertSets:
    """Selects experts.

    Args:
        run: the run.
        directory: the same run, whose commits are remembered.
        select: a name of `queries/arms/`, a file that ends with .sql, SQL, or a file of sets that ends with .json. SQL
            returns the columns layer, expert, optionally stack (default decoder), and `arm` or `label` if it selects
            several sets.
        name: of the set, if SQL selects one without a name.

    Raises:
        FileNotFoundError: there is no such file or name.
        ValueError: the SQL is invalid, lacks a column, selects no expert, or does more than to drop experts; a set has
            a name that cannot be an arm's; or the run does not have the experts.
    """
    if select.endswith(".json"):
        found = read_sets(Path(select))
    else:
        statement, name = _statement(select, name)
        rows, _ = rows_of(run, statement, "--select")
        attempts = Attempts()
        for commit in directory.commits():
            attempts.add(commit)
        found = ExpertSets(
            model={key: run.info["config"].get(key) for key in _MODEL},
            run={"plan_hash": run.info["plan_hash"], "commits": attempts.digest()},
            select=None if statement == select else select, sql=statement, sets=_grouped(rows, name),
        )  # fmt: skip
    found.arms_for(run)
    return found


def read_sets(path: Path) -> ExpertSets:
    """Reads a file that `ExpertSets.to_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("kind") != _KIND:
            raise ValueError("it is of another kind or version")
        sets = {name: [{**row, **_key(_dropped(row))} for row in rows] for name, rows in fields.pop("sets").items()}
        if not sets or not all(sets.values()):
            raise ValueError("it has no set, or one without experts")
        return ExpertSets(**fields, sets=sets)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; collector experts --save writes one") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no expert sets of collector experts --save: {error}") from error


def _statement(select: str, name: str) -> tuple[str, str]:
    """Returns SQL, and the name of a set without one."""
    if select.endswith(".sql"):
        return Path(select).read_text(encoding="utf-8"), name
    if " " in select.strip() or "\n" in select.strip():
        return select, name
    if select not in named_arms():
        raise ValueError(
            f"--select takes SQL, a SQL file, a JSON file, or one of {', '.join(named_arms())}; got {select}"
        )
    return named_sql(select), select


def _grouped(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    """Groups rows by set, each expert once; all are sorted, because SQL may return rows in any order."""
    found: dict[str, dict[tuple[str, int, int], dict[str, Any]]] = {}
    for number, row in enumerate(rows, 1):
        if missing := [column for column in ("layer", "expert") if row.get(column) is None]:
            raise ValueError(f"--select: row {number} lacks {' and '.join(missing)}; its columns are {', '.join(row)}")
        if row.get("operation", "drop") != "drop":
            raise ValueError(
                f"--select: row {number} has the operation {row['operation']}, and a set only says which experts: give "
                "the SQL itself to collector intervene --arms"
            )
        named = next((column for column in ("arm", "label") if row.get(column) is not None), None)
        key = _key(_dropped(row))
        rest = {
            column: _plain(value)
            for column, value in row.items()
            if column not in ("stack", "layer", "expert", "operation", named)
        }
        set_name = name if named is None else str(row[named])
        found.setdefault(set_name, {}).setdefault(tuple(key.values()), key | rest)
    if not found:
        raise ValueError("--select selects no expert")
    return {each: [own[key] for key in sorted(own)] for each, own in sorted(found.items())}


def _dropped(row: Mapping[str, Any]) -> Edit:
    given = {name: row.get(name) for name in ("stack", "layer", "expert")}
    return read({**given, "operation": "drop"})


def _key(edit: Edit) -> dict[str, Any]:
    return {"stack": edit.stack, "layer": edit.layer, "expert": edit.expert}


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | list) else str(value)
