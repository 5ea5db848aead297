"""Reads the queries of `queries/` with their headers, and binds their parameters.

A query is one SQL file with one select, in the folder of its group (`GROUPS`). The queries in `queries/comparison/`
compare two runs; they find the views of the second run in the schema `other`. The first steps that many queries share
are the table macros of `queries/macros/`. The header, in leading comments, gives the question, the formula with its
denominators, the source, the meaning of a row, the views it reads, parameters for an example, and its parameters:

    -- Params:
    --   m integer >= 1 = null: size of the sets (default: the layer's k)

What of it an imported run may lack, it says under `Needs:`, see `lacking`; which of its metrics depend on the number of
documents, under `Biased:`, see `inference.correction`.

Guarantees: a query binds exactly the parameters that its statement uses, each with a value of the
declared type. `warehouse` checks labels and layers against a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import graphlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from collector.query.lacking import read_needs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from collector.query.lacking import Need

Value = int | float | bool | str | list[str] | None
GROUPS = {
    "specialization": "Which experts does a language choose?",
    "overlap": "Do languages share experts?",
    "decisiveness": "How sure are the routers?",
    "load": "How evenly are the experts used?",
    "structure": "Which decisions belong together: experts, layers, positions, tokens?",
    "tokens": "What do experts read, token by token?",
    "outputs": "What do experts put out, and how well does the model predict?",
    "interventions": "What do experts cause?",
    "generation": "What happens while the model writes?",
    "comparison": "How do two runs of the same text differ?",
}
"""Folder of `queries/` -> what its queries ask, in the order of every list."""
COMPARISON = "comparison"
OTHER = "other"
"""Schema of the second run's views, in queries of two runs."""
LABEL_SUMS = frozenset({"assignments", "label_statistics", "label_outputs", "label_losses"})
"""Views with sums over the tokens of each label."""
_GIVEN = frozenset({"layers", "experts", "labels"})
"""Views that label-level queries may read beside these sums."""

_PARAM = re.compile(r"(?P<name>\w+) (?P<type>\S+?)(?: >= (?P<minimum>-?\d+))? = (?P<default>[^:]*): (?P<help>.*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Param:
    """A parameter that a query declares."""

    name: str
    type: str
    """SQL type: integer, double, boolean, varchar or varchar[]."""
    default: Value
    """None means the query's own default, described in `help`."""
    help: str
    minimum: int | None = None
    """Smallest value allowed."""

    def parse(self, value: object) -> Value:
        """Converts a value to the one to bind.

        Args:
            value: of the declared type, or its text: a list separated by commas; `all` or an empty
                text for null.

        Raises:
            ValueError: not a value of the declared type, below the minimum, or null although the
                parameter does not allow it.
        """
        try:
            parsed = _PARSERS[self.type](value.strip() if isinstance(value, str) else value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} takes {self.type}, got {value!r}") from error
        if parsed is None and self.default is not None:
            raise ValueError(f"{self.name} takes one {self.type} value, got {value!r}")
        if self.minimum is not None and isinstance(parsed, int) and parsed < self.minimum:
            raise ValueError(f"{self.name} must be at least {self.minimum}, got {value!r}")
        return parsed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """One file of `queries/`: the fields of its header, and its statement."""

    name: str
    group: str
    """Its folder, one of `GROUPS`."""
    question: str
    formula: str
    source: str
    grain: str
    """Meaning of a row, starting with its keys."""
    reads: tuple[str, ...]
    """Views that the statement reads."""
    example: str
    """Parameters of an example on the demo run, as on a command line."""
    params: tuple[Param, ...]
    sql: str
    needs: tuple[Need, ...] = ()
    """What imported runs may lack, and for which parts of the answer it is needed."""
    biased: tuple[str, ...] = ()
    """Metrics whose values depend on the number of documents."""

    @property
    def of_two_runs(self) -> bool:
        """Whether it compares two runs."""
        return self.group == COMPARISON

    @property
    def is_label_level(self) -> bool:
        """Whether its answer follows from sums over the tokens of each label (`LABEL_SUMS`), and only from these."""
        reads = frozenset(self.reads)
        return bool(reads & LABEL_SUMS) and reads <= LABEL_SUMS | _GIVEN

    def keys(self, columns: Sequence[str]) -> list[str]:
        """Returns those of the columns that identify a row: the ones with which the grain begins."""
        named = re.findall(r"(?<!\$)\b\w+", re.split(r"[;.]", self.grain)[0])
        return [column for column in columns if column in named]

    def bind(self, given: Mapping[str, object]) -> dict[str, Value]:
        """Returns values for all parameters: the given ones, else the defaults.

        Raises:
            ValueError: unknown parameter or bad value.
        """
        declared = {param.name: param for param in self.params}
        if unknown := sorted(set(given) - set(declared)):
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}; it takes {', '.join(declared) or 'none'}")
        return {name: p.parse(given[name]) if name in given else p.default for name, p in declared.items()}


def list_queries() -> list[Query]:
    """Returns all queries of one run, in the order of `GROUPS`, then by name."""
    return [_read_query(path) for path in _paths() if path.parent.name != COMPARISON]


def list_comparisons() -> list[Query]:
    """Returns all queries of two runs, by name."""
    return [_read_query(path) for path in _paths() if path.parent.name == COMPARISON]


def label_level_names() -> str:
    """Returns the names of the label-level queries, separated by commas."""
    return ", ".join(query.name for query in list_queries() if query.is_label_level)


def find_query(name: str) -> Query:
    """Returns the query of this name.

    Raises:
        ValueError: there is none; the message suggests the closest name, or lists all.
    """
    paths: dict[str, Path] = {}
    for path in _paths():
        if path.stem in paths:
            raise ValueError(f"two queries are called {path.stem}: {paths[path.stem]} and {path}; rename one")
        paths[path.stem] = path
    if name in paths:
        return _read_query(paths[name])
    close = difflib.get_close_matches(name, sorted(paths), n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(paths))}"
    raise ValueError(f"no query {name!r}; {hint}")


def remarks_of(name: str) -> str | None:
    """Returns the select of a query's remarks: why it may have no row, or an ambiguous one; None if it has none.

    It returns lines in a column `remark`, and takes parameters of the query.
    """
    path = query_folder() / "remarks" / f"{name}.sql"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def query_folder() -> Path:
    """Returns the folder of the SQL files: `queries/` of an installed package, else of a checkout."""
    installed = Path(__file__).parents[1] / "queries"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "queries"


def macros() -> str:
    """Returns the statements that create the macros; these read relations of the schema in use, by name."""
    bodies = {path.stem: path.read_text(encoding="utf-8").strip() for path in (query_folder() / "macros").glob("*.sql")}
    # A macro can only be created after those that it calls.
    calls = {name: {other for other in bodies if f" {other}(" in bodies[name]} - {name} for name in sorted(bodies)}
    return "\n".join(f"{bodies[name]};\n" for name in graphlib.TopologicalSorter(calls).static_order())


def _paths() -> list[Path]:
    """Returns the files of all queries, in the order of `GROUPS`, then by name."""
    return [path for group in GROUPS for path in sorted((query_folder() / group).glob("*.sql"))]


def read_header(sql: str) -> dict[str, str]:
    """Returns the text of the leading `-- Key: …` comments by key; continuation lines are indented."""
    fields: dict[str, list[str]] = {}
    key = ""
    for line in sql.splitlines():
        if not line.startswith("--"):
            break
        if match := re.match(r"-- (\w+): ?(.*)", line):
            key = match[1].lower()
            fields[key] = [match[2]] if match[2] else []
        else:
            fields[key].append(line.removeprefix("--").strip())
    return {key: "\n".join(lines) for key, lines in fields.items()}


def _read_query(path: Path) -> Query:
    sql = path.read_text(encoding="utf-8")
    header = read_header(sql)
    params = tuple(_read_params(header.pop("params", "")))
    query = Query(
        name=path.stem, sql=sql, params=params, reads=split_names(header.pop("reads")),
        needs=read_needs(header.pop("needs", "")),
        biased=tuple(filter(None, split_names(header.pop("biased", "")))),
        group=path.parent.name,
        **{key: header[key] for key in ("question", "formula", "source", "grain", "example")},
    )  # fmt: skip
    used = duckdb.extract_statements(sql)[0].named_parameters
    # An undeclared parameter could take its value from elsewhere in the session.
    if used != {param.name for param in params}:
        raise ValueError(
            f"{path}: the header declares other parameters than the statement uses: {', '.join(sorted(used))}"
        )
    return query


def split_names(text: str) -> tuple[str, ...]:
    """Splits names separated by commas."""
    return tuple(name.strip() for name in text.split(","))


def _read_params(text: str) -> Iterator[Param]:
    """Parses parameters from lines `name type [>= minimum] = default: help`; other lines continue the help."""
    joined: list[str] = []
    for line in text.splitlines():
        if _PARAM.fullmatch(line):
            joined.append(line)
        else:
            joined[-1] += " " + line
    for match in filter(None, map(_PARAM.fullmatch, joined)):
        minimum = int(match["minimum"]) if match["minimum"] else None
        default = None if match["default"] == "null" else _PARSERS[match["type"]](match["default"])
        yield Param(name=match["name"], type=match["type"], default=default, help=match["help"], minimum=minimum)


def _is_null(value: object) -> bool:
    return value is None or value in ("", "all")


def _integer(value: Any) -> int | None:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError
    return None if _is_null(value) else int(value)


def _double(value: Any) -> float | None:
    return None if _is_null(value) else float(value)


def _boolean(value: Any) -> bool | None:
    if _is_null(value):
        return None
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower())
    if not isinstance(value, bool):
        raise TypeError
    return value


def _varchar(value: Any) -> str | None:
    if not _is_null(value) and not isinstance(value, str):
        raise TypeError
    return None if _is_null(value) else value


def _varchar_list(value: Any) -> list[str] | None:
    if isinstance(value, str):
        value = None if _is_null(value) else [item.strip() for item in value.split(",") if item.strip()]
    if value is not None and not all(isinstance(item, str) for item in value):
        raise TypeError
    return list(value) if value else None


_PARSERS: dict[str, Callable[[Any], Value]] = {
    "integer": _integer, "double": _double, "boolean": _boolean, "varchar": _varchar, "varchar[]": _varchar_list,
}  # fmt: skip
