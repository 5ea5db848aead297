"""Tells the class of each entry of a vocabulary, with the SQL of `--by token_class`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import numpy as np

from collector.query.catalog import query_folder
from collector.query.groupings import find_grouping

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


def token_classes(vocabulary: pa.Table) -> NDArray[np.str_]:
    """Returns the class of each token id, up to the largest one; ids without an entry are `other`.

    Args:
        vocabulary: the columns of `vocab`.
    """
    grouping = find_grouping("token_class")
    assert grouping is not None, "it is no label"
    characters = (query_folder() / "views" / "vocab_characters.sql").read_text(encoding="utf-8")
    with duckdb.connect() as connection:
        connection.register("vocab", vocabulary)
        connection.execute(f"create view vocab_characters as {characters}")
        connection.execute(
            "create view tokens as select 0 as shard, token_id as tok, token_id, false as is_special from vocab"
        )
        rows = connection.execute(grouping.sql).fetchall()
    classes = np.full(1 + max((tok for _, tok, _ in rows), default=-1), "other", dtype="<U16")
    for _, tok, name in rows:
        classes[tok] = name
    return classes
