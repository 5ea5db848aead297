"""Finds the committed files of a run, and writes the SQL script that creates its views in a DuckDB.

The base relations `routing`, `tokens`, `documents`, `rejects` and `vocab` read exactly the files that commit records
name when the script is written, never a glob; `layers` and `arms` come from run.json. A run without a commit has the
same columns and no rows. The views of `queries/views/` build on them. This module decides what `label` means there,
and whether counts come from a rollup.

Guarantees: only commit records, run.json, the vocabulary and the names of files are read, never the tables. `warehouse`
executes the script, and so can any other DuckDB.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from collector.capture.recorders import table_names, table_schemas
from collector.data.sources import LABEL_SEPARATOR
from collector.models.edits import parse_arm, tell
from collector.query.catalog import macros
from collector.query.groupings import LABEL, derived_views, find_grouping, option_for
from collector.query.matching import crossed, find_strata
from collector.query.rollup import files as rollups
from collector.store import tables
from collector.store.remote_files import RunFiles
from collector.store.run_directory import MAPS, RUN, SUCCESS, VOCAB, WEIGHTS, ObjectStore, RunDirectory, weights_name
from collector.store.sweep_directory import hint as sweep_hint

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa

    from collector.query.groupings import Grouping

_SQL_TYPES = {
    "uint8": "utinyint", "uint16": "usmallint", "uint32": "uinteger", "uint64": "ubigint", "bool": "boolean",
    "string": "varchar", "double": "double", "float": "float",
    "list<item: float>": "float[]", "list<element: float>": "float[]",
    "list<item: halffloat>": "float[]", "list<item: uint16>": "usmallint[]", "list<item: uint32>": "uinteger[]",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Located:
    """The files of a run and the script that creates its views in a DuckDB."""

    info: dict[str, Any]
    """Content of run.json."""
    complete: bool
    """Whether every shard is committed."""
    paths: frozenset[str]
    """The files that the script opens, in its spelling."""
    mounts: tuple[RunFiles, ...]
    """The file system of the files, if they are on an object store."""
    views: dict[str, str]
    """Selects of the derived views, by name."""
    absent: dict[str, str]
    """What the views need that this run cannot have, by name."""
    by: str
    """What `label` means: the recorded label, or the name of a grouping."""
    several_labels: bool
    """Whether documents have several labels."""
    schema: str
    """Schema of the views."""
    script: str
    """SQL that creates the views, and those of the strata."""
    strata: Located | None = None
    """The same run, whose labels are a label and a stratum; None if labels are not matched."""
    match: str = ""
    """Names of the groupings that labels are matched on, separated by commas."""


def locate(
    root: str | os.PathLike[str],
    *,
    by: str = LABEL,
    match: str | Sequence[str] | None = None,
    rollup: bool = True,
    schema: str = "main",
    files_of: type[RunFiles] = RunFiles,
) -> Located:
    """Finds the committed files of a run.

    Args:
        root: the run directory.
        by: what `label` means, see `open_run`.
        match: what labels are matched on, see `open_run`.
        rollup: whether to read counts from the run's rollup, see `open_run`.
        schema: schema of the views.
        files_of: class of the file system of a remote run.

    Raises:
        FileNotFoundError: there is no run.
        StoreError: the object store refuses or does not answer.
        ValueError: for the same reasons as `open_run`.
    """
    grouping, strata, run = find_grouping(by), find_strata(match, by), RunDirectory(root)
    info = read_info(run)
    files, several = _committed_files(run, info, rollup=rollup)
    several_labels = several and grouping is None  # a grouping gives each document, or token, one label
    for one in (*([] if grouping is None else [grouping]), *strata):
        _check_grouping(one, info, files)
    views, absent = _derived_views(info, grouping, rollup=rollups.DOCUMENTS in files)
    if "weights" not in files:
        absent["weights"] = f"which `collector weights {run.root}` makes from the model"
    if "maps" not in files:
        absent["maps"] = f"which `collector map {run.root} --layer …` makes from what --record similarity keeps"
    if imported := info.get("imported"):
        told = f"which runs of `collector collect` can have; this one was imported from {imported['from']}"
        absent = dict.fromkeys(absent, told)
    sizes = {path: size for paths in files.values() for path, size in paths.items()}
    mounts: tuple[RunFiles, ...] = ()
    if isinstance(run.store, ObjectStore):
        mounts = (files_of(run.store, sizes),)
        prefix = f"{files_of.protocol}://"
        paths = {prefix + path for path in sizes}
    else:
        prefix = run.store.location("").rstrip("/") + "/"
        paths = {prefix + path for path in sizes}
        paths |= {_escape_glob(path) for path in paths}
    write = functools.partial(_script, files, info, prefix=_escape_glob(prefix), several_labels=several_labels)
    located = Located(
        info=info, complete=run.read_or_none(SUCCESS) is not None, paths=frozenset(paths), mounts=mounts,
        views=views, absent=absent, by=by, several_labels=several_labels, schema=schema,
        script=write(views, schema=schema),
    )  # fmt: skip
    if not strata:
        return located
    pairs, own = crossed(grouping, strata), f"{schema}_strata"
    views, absent = _derived_views(info, pairs, rollup=rollups.DOCUMENTS in files)
    return dataclasses.replace(
        located,
        script=f"{located.script}\ncreate schema {own};\n{write(views, schema=own)}",
        strata=dataclasses.replace(located, views=views, absent=absent, by=pairs.name, schema=own), match=pairs.name,
    )  # fmt: skip


def _check_grouping(grouping: Grouping, info: dict[str, Any], files: Mapping[str, Mapping[str, int]]) -> None:
    """Rejects a grouping that reads a relation, or a column (`tokens.span`), that this run does not have."""
    named = f"{grouping.option} {grouping.name}"
    for needed in grouping.needs:
        relation, _, column = needed.partition(".")
        if column and needed not in _recorded(info) and relation != "tokens":
            raise ValueError(f"{named} needs what {option_for(needed)} keeps; this run was collected without")
        if column and needed not in _recorded(info):
            raise ValueError(
                f"{named} needs the column {column} of {relation}, which a run of an earlier version "
                "does not have: collect it again"
            )
        if not column and not files[relation] and "imported" in info:
            raise ValueError(
                f"{named} needs {' and '.join(grouping.needs)}, which this run does not have: import it "
                "with --tokenizer"
            )
        if not column and not files[relation]:
            raise ValueError(
                f"{named} needs {' and '.join(grouping.needs)}, which this run does not have, because it "
                f"was collected with --token-ids {info['config'].get('token_ids')}; a run with --token-ids keep has it"
            )


def locate_shard(paths: Mapping[str, Path], info: dict[str, Any]) -> Located:
    """Treats the files of one shard as a run of their own.

    Args:
        paths: local files by table.
        info: content of run.json.
    """
    files: dict[str, dict[str, int]] = {table: {} for table in (*table_names(info), "vocab")}
    files |= {table: {_escape_glob(str(path)): 0} for table, path in paths.items()}
    views, absent = _derived_views(info)
    absent |= dict.fromkeys(("weights", "maps"), "which are the run's, not a shard's")
    spelled = {str(path) for path in paths.values()} | {name for one in files.values() for name in one}
    return Located(
        info=info, complete=False, paths=frozenset(spelled), mounts=(), views=views, absent=absent, by=LABEL,
        several_labels=True, schema="main", script=_script(files, info, views, prefix="", several_labels=True),
    )  # fmt: skip


def committed_files(root: str | os.PathLike[str], table: str) -> list[str]:
    """Returns the files of a table, for other programs: paths, or URLs on an object store.

    Args:
        root: the run directory.
        table: `routing`, `tokens`, `documents`, `rejects`, `vocab`, or `weights` and `maps` if there are any.

    Returns:
        The files that commit records name, by shard. A glob could also match leftovers of replicas that died.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: there is no such table.
    """
    run = RunDirectory(root)
    files, _ = _committed_files(run, read_info(run))
    if table not in files:
        raise ValueError(f"a run has no table {table!r}; it has {', '.join(files)}")
    return [run.store.location(path) for path in files[table]]


def views_sql(run_directory: RunDirectory, *, in_place: bool = False) -> str:
    """Returns the SQL script that creates the views of a run in any DuckDB.

    Args:
        run_directory: the run.
        in_place: whether to name files by full path or URL, so that DuckDB may start anywhere (its extension httpfs
            reads s3:// and gs://, azure reads az://); otherwise DuckDB must be started inside the run's folder.
    """
    prefix = _escape_glob(run_directory.store.location("").rstrip("/") + "/") if in_place else ""
    start = "" if in_place else " Inside its folder: duckdb -init views.sql"
    head = f"-- The views of this run, over its committed files.{start}\n\n"
    info = read_info(run_directory)
    views, _ = _derived_views(info)
    files, several = _committed_files(run_directory, info)
    return head + _script(files, info, views, prefix=prefix, several_labels=several)


def read_info(run: RunDirectory) -> dict[str, Any]:
    """Returns the content of run.json.

    Raises:
        FileNotFoundError: there is no run, and perhaps a sweep.
        ValueError: it is in the layout of an earlier version.
    """
    try:
        info = run.read_json(RUN)
    except FileNotFoundError as error:
        told = sweep_hint(run.root) or f"there is no {RUN}; name the folder that `collector collect` wrote"
        message = f"no run at {run.root}: {told}"
        raise FileNotFoundError(message) from error
    if any("stack" not in router for router in info["layers"]):
        raise ValueError(f"{run.root} was written by an earlier version, without a stack per router: collect it again")
    return info


def _derived_views(
    info: Mapping[str, Any], grouping: Grouping | None = None, *, rollup: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the selects of the views, and what relations that this run cannot have need."""
    views, absent = derived_views(grouping, rollup=rollup, recorded=_recorded(info))
    if not info.get("compute"):
        absent["components"] = "which this run does not have: its model could not be counted, or its version did not"
    if not info["config"].get("arms"):
        absent["arms"] = "which only runs of `collector intervene` or with --record effects have"
    return views, absent


def _recorded(info: Mapping[str, Any]) -> set[str]:
    """Returns the tables of a run, and their columns as `TABLE.COLUMN`."""
    schemas = table_schemas(info)
    return {*schemas} | {f"{table}.{name}" for table, schema in schemas.items() for name in schema.names}


def _committed_files(
    run: RunDirectory, info: Mapping[str, Any], *, rollup: bool = False
) -> tuple[dict[str, dict[str, int]], bool]:
    """Finds the files that count, and whether documents have several labels.

    Returns:
        Relation -> path in the run directory -> bytes, with the current rollup if it is wanted and exists; and whether
        a commit counts a document with several labels.
    """
    several = False
    files: dict[str, dict[str, int]] = {table: {} for table in (*table_names(info), "vocab")}
    covered = rollups.Covered()
    for commit in run.commits():
        covered.add(commit)
        several |= commit.several_labels > 0
        for table in files.keys() & commit.files.keys():
            files[table][commit.files[table].path] = commit.files[table].bytes
    weights = {entry.name: entry.size for entry in run.store.entries(WEIGHTS)}
    if (name := weights_name(info)) in weights:
        files["weights"] = {name: weights[name]}
    if maps := {entry.name: entry.size for entry in run.store.entries(MAPS)}:
        files["maps"] = maps
    vocabulary = run.read_or_none(VOCAB)
    if vocabulary is not None:
        files["vocab"][VOCAB] = len(vocabulary)
    return files | (rollups.find(run, covered) if rollup else {}), several


def _script(
    files: Mapping[str, Mapping[str, int]],
    info: dict[str, Any],
    views: Mapping[str, str],
    *,
    prefix: str,
    schema: str = "main",
    several_labels: bool = False,
) -> str:
    """Returns the statements for the views of a schema, and the macros; `prefix` is put before the files' paths."""
    statements = {"layers": _layers_select(info["layers"])}
    if info.get("compute"):
        statements["components"] = _components_select(info["compute"])
    if arms := info["config"].get("arms"):
        statements["arms"] = _arms_select(arms)
    for name, paths in files.items():
        select = _files_select([prefix + path for path in paths]) if paths else _empty_select(name, info)
        statements[f"recorded_{name}" if name in views else name] = select
    documents = "recorded_documents" if "documents" in views else "documents"
    statements["label_sets"] = _label_sets_select(documents) if several_labels else _NO_LABEL_SETS
    statements |= views
    within = "" if schema == "main" else f"{schema}."
    created = [f"create or replace view {within}{name} as\n{select};\n" for name, select in statements.items()]
    # Those of the main schema are found in the others, too, and read the views of the schema in use.
    return "\n".join([*created, macros()] if schema == "main" else created)


_NO_LABEL_SETS = "select null::varchar as label_set, null::varchar as label where false"


def _label_sets_select(documents: str) -> str:
    """Returns a select with a row for each recorded label that stands for several, and each of these."""
    return (
        f"select distinct label as label_set, unnest(string_split(label, {literal(LABEL_SEPARATOR)})) as label\n"
        f"from {documents}\nwhere contains(label, {literal(LABEL_SEPARATOR)})"
    )


def literal(text: str) -> str:
    """Quotes a text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def _escape_glob(path: str) -> str:
    """Escapes a path so that DuckDB does not treat it as a glob."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def _files_select(paths: list[str]) -> str:
    # Otherwise a folder called `layer=3` in the path would become a column.
    names = ",\n    ".join(map(literal, paths))
    return f"select * from read_parquet([\n    {names}\n], hive_partitioning = false)"


def _layers_select(layers: list[dict[str, Any]]) -> str:
    rows = ",\n    ".join(
        f"({literal(one['stack'])}, {one['layer']}::utinyint, {one['n_experts']}::integer, {one['top_k']}::integer, "
        f"{str(one['has_capacity']).lower()}, {literal(one['router'])})"
        for one in layers
    )
    return f"select * from (values\n    {rows}\n) as layers (stack, layer, n_experts, top_k, has_capacity, router)"


def _components_select(components: list[dict[str, Any]]) -> str:
    names = {"stack": "varchar", "layer": "utinyint", "component": "varchar"} | dict.fromkeys(
        ("parameters", "flops", "context_flops", "window", "experts"), "bigint"
    )
    values = [
        ", ".join(
            "null" if one[name] is None else literal(one[name]) if isinstance(one[name], str) else str(one[name])
            for name in names
        )
        for one in components
    ]
    rows = "),\n    (".join(values)
    typed = ", ".join(f'"{name}"::{kind} as "{name}"' for name, kind in names.items())
    quoted = ", ".join(f'"{name}"' for name in names)
    return f"select {typed} from (values\n    ({rows})\n) as components ({quoted})"


def _arms_select(arms: Iterable[str]) -> str:
    """Returns a select with a row for each edit of each arm and control, which stay text until somebody asks."""
    rows = ",\n    ".join(
        f"({literal(arm.name)}, {arm.control}, {literal('; '.join(map(tell, arm.edits)))})"
        for arm in map(parse_arm, arms)
    )
    columns = ",\n    ".join(
        f"nullif(regexp_extract(edit, '(?:^| ){name}=([^ ]+)', 1), '')::{kind} as {name}"
        for name, kind in (
            ("layer", "utinyint"), ("expert", "integer"), ("operation", "varchar"), ("value", "double"),
            ("position", "integer"),
        )
    )  # fmt: skip
    limits = ",\n    ".join(
        f"url_decode(nullif(regexp_extract(edit, ' {name}=([^ ]+)', 1), '')) as {name}"
        for name in ("label", "token_class")
    )
    stack = "coalesce(nullif(regexp_extract(edit, 'stack=([^ ]+)', 1), ''), 'decoder') as stack"
    return (
        f"select arm, control::usmallint as control, {stack},\n    {columns},\n    {limits}\n"
        "from (select arm, control, unnest(string_split(edits, '; ')) as edit\n"
        f"from (values\n    {rows}\n) as told (arm, control, edits))"
    )


def _empty_select(name: str, info: dict[str, Any]) -> str:
    """Returns a select with the columns of `name` and no rows."""
    columns = (f"null::{_SQL_TYPES[_arrow_type(field)]} as {field.name}" for field in _schema(name, info))
    return f"select {', '.join(columns)} where false"


def _arrow_type(field: pa.Field) -> str:
    return str(getattr(field.type, "value_type", field.type) if str(field.type).startswith("dict") else field.type)


def _schema(name: str, info: dict[str, Any]) -> pa.Schema:
    return (table_schemas(info) | {"vocab": tables.VOCAB_SCHEMA})[name]
