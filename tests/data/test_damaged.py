"""Compressed files that are damaged: the rows before are read, the rest is one shard that says what is wrong."""

from __future__ import annotations

import gzip
import sys
from typing import TYPE_CHECKING

import pytest

from collector.data import plan
from collector.data.formats.base import DamagedError
from tests.helpers.documents import ENDINGS, PACK, ROWS, config, json_lines, pack, read, write

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from pathlib import Path

    from collector.data.sources import Document


def outcomes(path: Path, **data) -> tuple[list[Document], list[str]]:
    """The rows of all shards that can be read, and the errors of the others."""
    settings = config(path, docs_per_shard=64, **data)
    rows, errors = [], []
    for shard in plan.make_plan(settings).shards:
        try:
            rows += list(plan.read_shard(shard, settings.data))
        except DamagedError as error:
            errors.append(str(error))
    return rows, errors


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_a_file_that_is_cut_off_keeps_the_rows_before(tmp_path: Path, kind: str, ending: str) -> None:
    lines = json_lines(tmp_path / "a.jsonl", 6000).read_text(encoding="utf-8").splitlines()
    plain = tmp_path / f"b.{kind}"
    plain.write_text("".join(f"{line.replace(',', ' ')}\n" for line in ["0", *lines]), encoding="utf-8")
    path = pack(plain, ending)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    columns = {"text_column": "0", "label_column": "@file"} if kind != "txt" else {}
    settings = config(path, docs_per_shard=64, **columns)
    rows = [row for shard in plan.make_plan(settings).shards[:-1] for row in plan.read_shard(shard, settings.data)]
    got, errors = outcomes(path, **columns)
    assert got == rows
    assert 3000 < len(rows) < 4500
    assert len(errors) == 1
    assert str(path) in errors[0]
    assert "is damaged: it ends too early" in errors[0]
    assert "fetch or write the file anew" in errors[0]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_row_that_was_there_before_the_cut_is_kept(tmp_path: Path, ending: str) -> None:
    """A cut between two members loses nothing, and a cut in the last bytes of one nothing but its check."""
    path = pack(json_lines(tmp_path / "a.jsonl", 300), ending)
    member = path.read_bytes()
    path.write_bytes(member + member[:4])
    assert len(outcomes(path)[0]) == 300
    assert len(outcomes(path)[1]) == 1
    if ending == "gz":
        path.write_bytes(member[:-3])
        assert len(outcomes(path)[0]) == 300
        assert len(outcomes(path)[1]) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_bytes_that_are_wrong_are_noticed(tmp_path: Path, ending: str) -> None:
    path = json_lines(tmp_path / "a.jsonl", 3000)
    checked = zstd.compress(path.read_bytes(), options={zstd.CompressionParameter.checksum_flag: 1})
    content = bytearray(gzip.compress(path.read_bytes()) if ending == "gz" else checked)
    content[-6 if ending == "gz" else -2] ^= 0xFF
    path.with_name(f"a.jsonl.{ending}").write_bytes(content)
    rows, errors = outcomes(path.with_name(f"a.jsonl.{ending}"))
    assert len(errors) == 1
    assert "is damaged" in errors[0]
    assert len(rows) > (2850 if ending == "gz" else 2000)
    numbers = [int(row.text.split()[0]) for row in rows]
    assert numbers == list(range(len(rows)))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, kind: str, ending: str) -> None:
    """It does not stop the plan of the others."""
    (tmp_path / f"bad.{kind}.{ending}").write_bytes(b"\xff text,label\nthis is not compressed,x\n" * 50)
    json_lines(tmp_path / "good.jsonl", 10)
    settings = config(tmp_path / "*")
    broken, good = plan.make_plan(settings).shards
    assert (broken.first_row, broken.rows, broken.offset) == (0, 1, 0)
    with pytest.raises(DamagedError, match=rf"bad\.{kind}\.{ending} is damaged"):
        list(plan.read_shard(broken, settings.data))
    assert len(list(plan.read_shard(good, settings.data))) == 10


@pytest.mark.parametrize("chosen", [{"limit": 250}, {"per_label": 250}])
def test_a_selection_keeps_the_rows_before_the_damage(tmp_path: Path, chosen: dict[str, int]) -> None:
    path = pack(json_lines(tmp_path / "a.jsonl", 400), "gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows, errors = outcomes(path, **chosen)
    assert len(errors) == 1
    assert rows == outcomes(path)[0]
    assert 150 < len(rows) < 250
    assert len(rows) % 64, "the last ones share no shard with the damage"


def test_zeros_behind_the_last_member_are_no_damage(tmp_path: Path) -> None:
    path = pack(write(tmp_path, "jsonl"), "gz", 2)
    path.write_bytes(path.read_bytes() + bytes(200_000))
    assert [row.id for row in read(path)] == [row["id"] for row in ROWS]


def test_empty_compressed_files_have_no_rows(tmp_path: Path) -> None:
    for ending in ENDINGS:
        (tmp_path / f"empty.jsonl.{ending}").write_bytes(b"")
        (tmp_path / f"nothing.csv.{ending}").write_bytes(PACK[ending](b""))
    with pytest.raises(ValueError, match="no row at all"):
        read(tmp_path / "*")
