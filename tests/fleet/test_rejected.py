"""When a run has rejected too many rows, and what it says then."""

from __future__ import annotations

import pytest

from collector.config import LaunchConfig
from collector.data.formats.base import REASONS
from collector.fleet.rejected import REMEDIES, complaint


@pytest.mark.parametrize(
    ("rejected", "limit", "enough"),
    [(0, 0.0, True), (1, 0.0, False), (50, 0.5, True), (51, 0.5, False), (99, 1.0, True), (100, 1.0, False)],
)
def test_the_limit_is_a_share_of_the_planned_rows_and_one_document_is_needed(rejected, limit, enough):
    assert (complaint({"no text": rejected}, 100, limit) is None) == enough


def test_reasons_come_with_their_remedies_the_commonest_first():
    said = complaint({"no label": 1, "a reason to come": 2, "no text": 3000, "empty line": 0}, 3100, 0.5)
    assert said == (
        "3,003 of 3,100 rows were rejected, more than --max-rejected 0.5 allows: 3,000 no text (--text-column names "
        "the column); 2 a reason to come; 1 no label (--label-column names the column, @file or "
        "@folder takes it from the path). "
        "Other columns or other data need another --out; with --max-rejected 1 the same command accepts these and goes "
        "on"
    )
    assert complaint({"invalid JSON": 7}, 7) == (
        "no document was collected, all 7 rows were rejected: 7 invalid JSON (each line must be one JSON object). "
        "Other columns or other data need another --out"
    )


def test_every_remedy_is_for_a_reason_that_exists():
    assert REMEDIES.keys() <= set(REASONS)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_limit_must_be_a_share(share):
    with pytest.raises(ValueError, match=r"--max-rejected takes a share from 0 to 1, got"):
        LaunchConfig(max_rejected=share)
