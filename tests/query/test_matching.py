"""Matched comparisons: by hand, against numpy over single tokens, and where a confound alone makes the difference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from collector.data.sources import LABEL_SEPARATOR
from collector.query import inference
from collector.query.catalog import list_queries
from collector.query.comparison import open_runs
from collector.query.document_counts import document_counts, document_losses
from collector.query.inference import resampling, standardization
from collector.query.inference.answers import ask
from collector.query.inference.bootstrap import effective_documents, fewest_documents, sampled_values
from collector.query.rollup import making
from collector.query.warehouse import Run, open_run
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.command_line import collector
from tests.helpers.synthetic import Shard, random_shard, write_run
from tests.query.test_inference import DOCUMENTS, LAYERS, repeated

SEVERAL = [("en", 7), (f"en{LABEL_SEPARATOR}ko", 5), ("ko", 3), ("en", 9), (f"ko{LABEL_SEPARATOR}th", 12), ("th", 4)]
LABEL_LEVEL = [query.name for query in list_queries() if query.is_label_level]
OF_TOKENS = [name for name in LABEL_LEVEL if "contribution" not in name]
ONE = [Layer(layer=0, n_experts=4, top_k=1)]


@pytest.fixture(scope="module")
def shard() -> Shard:
    return random_shard(np.random.default_rng(5), LAYERS, DOCUMENTS)


@pytest.fixture(scope="module")
def folder(shard: Shard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("matching") / "run", LAYERS, [shard])


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder, match="position")


def buckets(documents) -> np.ndarray:
    """[T] position bucket of each token, as `--by position` names them: its first position."""
    positions = np.concatenate([np.arange(length) for _, length in documents])
    return np.where(positions == 0, 0, 2 ** np.floor(np.log2(np.maximum(positions, 1))))


def token_weights(documents, is_special: np.ndarray, labels: list[str]) -> dict[str, np.ndarray]:
    """[T] weight of each token for each label, from the definition: least / N_gD in strata that all labels have."""
    stratum_t = buckets(documents)
    named_t = np.repeat([label for label, _ in documents], [length for _, length in documents])
    sets_t = [name.split(LABEL_SEPARATOR) for name in named_t]
    has = {label: np.array([label in names for names in sets_t]) & ~is_special for label in labels}
    weights = {label: np.zeros(len(stratum_t)) for label in labels}
    for stratum in np.unique(stratum_t):
        tokens = {label: (has[label] & (stratum_t == stratum)).sum() for label in labels}
        for label in labels:
            if tokens[label]:
                weights[label][has[label] & (stratum_t == stratum)] = min(tokens.values()) / tokens[label]
    return weights


# ---- the weights ----


def test_by_hand(tmp_path: Path) -> None:
    # en: a document of 4 tokens; ko: two of 2. Position 0: 1 and 2 tokens, 1: 1 and 2, 2-3: 2 and none.
    shard = Shard.of_picks(
        ONE, documents=[("en", 4), ("ko", 2), ("ko", 2)], experts={0: [[0], [1], [2], [2], [0], [1], [3], [1]]}
    )
    run = open_run(write_run(tmp_path / "run", ONE, [shard]), match="position")
    rows = run.query("domain_specialization").to_arrow_table().to_pylist()
    assert {(row["label"], row["expert"]): row["value"] for row in rows if row["value"]} == {
        ("en", 0): 0.5, ("en", 1): 0.5, ("ko", 0): 0.25, ("ko", 3): 0.25, ("ko", 1): 0.5,
    }  # fmt: skip
    assert {row["n"] for row in rows} == {2}
    assert run.remarks("domain_specialization") == [
        "matched on position: 2 labels share 2 of 3 strata and count as 2 tokens each; without a match: 50.0% of en"
    ]


@pytest.mark.parametrize("documents", [DOCUMENTS, SEVERAL], ids=["one label", "several labels"])
def test_every_token_has_the_weight_of_its_stratum(documents, tmp_path: Path) -> None:
    shard = random_shard(np.random.default_rng(8), LAYERS, documents)
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard]), match="position")
    weights = token_weights(documents, shard.is_special, ["en", "ko", "th"])
    for one in LAYERS:
        rows = run.query("domain_specialization", layer=one.layer).to_arrow_table().to_pylist()
        for label, w_t in weights.items():
            chosen_te = (shard.experts[one.layer][:, :, None] == np.arange(one.n_experts)).any(axis=1)
            got = [row for row in rows if row["label"] == label]
            assert [row["value"] for row in got] == pytest.approx(w_t @ chosen_te / w_t.sum())
            assert {row["n"] for row in got} == {round(w_t.sum())}
        entropy = run.query("router_entropy", layer=one.layer).to_arrow_table().to_pylist()
        for label, w_t in weights.items():
            wanted = w_t @ shard.statistics[one.layer]["entropy"] / w_t.sum()
            got = [row["value"] for row in entropy if (row["metric"], row["label"]) == ("router_entropy", label)]
            assert got == [pytest.approx(wanted, rel=5e-4)], "recorded with 12 significant bits"
    has_loss = ~np.isnan(shard.losses)
    weights = token_weights(documents, shard.is_special | ~has_loss, ["en", "ko", "th"])
    for row in run.query("loss").to_arrow_table().to_pylist():
        if row["metric"] == "nats_per_token":
            w_t = weights[row["label"]]
            assert row["value"] == pytest.approx(w_t @ np.where(has_loss, shard.losses, 0) / w_t.sum(), rel=1e-5)
            assert row["n"] == round(w_t.sum())


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Run]:
    """A run in which all labels have the same strata: as it is, and matched."""
    documents = [("en", 6), ("ko", 3), ("en", 3), ("ko", 6), ("th", 3), ("th", 6)]
    shard = random_shard(np.random.default_rng(3), LAYERS, documents, special=0)
    folder = write_run(tmp_path_factory.mktemp("balanced") / "run", LAYERS, [shard])
    return {match: open_run(folder, match=match) for match in (None, "position", "length")}


@pytest.mark.parametrize("name", LABEL_LEVEL)
def test_labels_with_the_same_strata_answer_as_they_are(name: str, balanced: dict[str | None, Run]) -> None:
    wanted = balanced[None].query(name).to_arrow_table()
    for match in ("length", "position")[: 1 if "contribution" in name else 2]:
        got = balanced[match].query(name).to_arrow_table()
        assert got.schema == wanted.schema
        for row, other in zip(got.to_pylist(), wanted.to_pylist(), strict=True):
            if match == "position" and row["metric"] == "bits_per_character":  # which of them a token has is not known
                assert row["value"] is None
            else:
                assert row == pytest.approx(other, rel=1e-6)


def test_only_the_labels_that_are_compared_decide_what_is_shared(run: Run) -> None:
    def tokens(**params) -> set:
        return set(run.query("reference_difference", layer=3, **params).to_arrow_table()["n"].to_pylist())

    every, two = tokens(reference="en"), tokens(reference="en", labels=["ko"])
    assert every < {*every, *two}
    assert tokens(labels=["ko"]) == two, "en has the most tokens"


def test_groupings_of_documents_and_tokens_cross(folder: Path, shard: Shard) -> None:
    run = open_run(folder, match=["position", "length"])
    (told,) = run.remarks("effective_experts", labels=["en", "ko"])
    lengths = np.repeat([2 ** int(np.log2(length)) for _, length in DOCUMENTS], [length for _, length in DOCUMENTS])
    seen = {*zip(shard.labels, buckets(DOCUMENTS), lengths, shard.is_special, strict=True)}
    strata = {
        label: {(bucket, length) for own, bucket, length, special in seen if own == label and not special}
        for label in ("en", "ko")
    }
    shared, every = len(strata["en"] & strata["ko"]), len(strata["en"] | strata["ko"])
    assert told.startswith(f"matched on position,length: 2 labels share {shared} of {every} strata and count as ")


def test_a_rollup_gives_the_same_where_documents_are_matched(folder: Path, tmp_path: Path, shard: Shard) -> None:
    again = write_run(tmp_path / "run", LAYERS, [shard])
    making.make(RunDirectory(str(again)))
    for name in ("domain_specialization", "router_entropy"):
        got, wanted = (open_run(each, match="length").query(name).to_arrow_table() for each in (again, folder))
        for row, other in zip(got.to_pylist(), wanted.to_pylist(), strict=True):
            assert row == pytest.approx(other, rel=1e-5)


def test_groups_of_tokens_are_matched_as_labels_are(folder: Path) -> None:
    run = open_run(folder, by="position", match="length")
    (told,) = run.remarks("effective_experts", labels=["000000", "000001"])
    assert told.startswith("matched on length: 2 labels share ")
    assert inference.intervals(run, "effective_experts", labels=["000000", "000001"], resamples=20).num_rows == 4


def test_each_of_two_runs_is_matched(folder: Path) -> None:
    pair = open_runs(folder, folder, match="position")
    rows = pair.query("effective_experts").to_arrow_table().to_pylist()
    assert {row["difference"] for row in rows} == {0.0}
    assert rows[0]["n"] == open_run(folder, match="position").query("effective_experts").fetchall()[0][6]
    assert pair.remarks("effective_experts")


@pytest.mark.parametrize(
    ("match", "by", "name", "told"),
    [
        ("position", "label", "repetition", "repetition reads token_decisions"),
        (
            "position",
            "label",
            "expert_contribution",
            "sums over whole documents; --match position groups single tokens",
        ),
        ("label", "label", "", "matched on themselves: --by label --match label"),
        ("length,position", "position", "", "matched on themselves: --by position --match length,position"),
        ("positions", "label", "", "no grouping 'positions'"),
        ("source,length", "length", "", "matched on themselves"),
    ],
)
def test_what_cannot_be_matched_is_told(match: str, by: str, name: str, told: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=told):
        open_run(folder, by=by, match=match).query(name)


def test_labels_without_a_shared_stratum_are_refused(tmp_path: Path) -> None:
    shard = Shard.of_picks(ONE, documents=[("en", 2), ("ko", 4)], experts={0: [[0]] * 6})
    run = open_run(write_run(tmp_path / "run", ONE, [shard]), match="length")
    for ask_for in (lambda: run.query("effective_experts"), lambda: inference.intervals(run, "effective_experts")):
        with pytest.raises(ValueError, match="no stratum of length has tokens of all 2 labels: compare fewer"):
            ask_for()
    assert run.query("effective_experts", labels=["ko"]).fetchall()


# ---- samples of documents ----


@pytest.mark.parametrize("name", OF_TOKENS)
def test_all_documents_are_a_sample_that_answers_as_the_run(name: str, run: Run) -> None:
    answer, asked = ask(run, name, {})
    for counts in document_losses(run) if name == "loss" else document_counts(run):
        rows = answer if name == "loss" else answer.filter(pc.equal(answer["layer"], counts.layer))
        got = asked.values(rows, counts, resampling.whole(counts))[:, 0]
        wanted = [np.nan if value is None else value for value in rows["value"].to_pylist()]
        assert got == pytest.approx(np.array(wanted), nan_ok=True, rel=1e-5, abs=1e-7)


def test_a_sample_answers_as_a_matched_run_of_the_drawn_documents(run: Run, shard: Shard, tmp_path: Path) -> None:
    answer, asked = ask(run, "domain_specialization", {"layer": 0})
    labels = [label for label, _ in DOCUMENTS]
    names = sorted(set(labels))
    rngs = dict(zip(names, resampling.label_generators(tuple(names), 1), strict=True))
    drawn = {label: resampling.draw(rng, labels.count(label), labels.count(label), 2) for label, rng in rngs.items()}
    (counts,) = document_counts(run, layer=0)
    sampled = sampled_values(asked, answer, counts, resamples=2, seed=1)
    for sample in range(2):
        places = {label: iter(drawn[label][sample].astype(int)) for label in drawn}
        times = np.array([next(places[label]) for label in labels])
        again = open_run(write_run(tmp_path / f"{sample}", LAYERS, [repeated(shard, times)]), match="position")
        wanted = again.query("domain_specialization", layer=0).to_arrow_table()["value"].to_pylist()
        assert sampled[:, sample] == pytest.approx(np.array(wanted))


def test_documents_count_by_their_weighted_tokens(run: Run, shard: Shard) -> None:
    (counts,) = document_counts(run, layer=0)
    rows = run.query("effective_experts", layer=0).to_arrow_table()
    weights = token_weights(DOCUMENTS, shard.is_special, ["en", "ko", "th"])
    doc_t = np.repeat(np.arange(len(DOCUMENTS)), shard.lengths)
    lengths = {label: np.bincount(doc_t, w_t) for label, w_t in weights.items()}
    worth = [n.sum() ** 2 / (n**2).sum() for n in lengths.values()]
    assert effective_documents(rows, counts) == pytest.approx(worth)
    assert fewest_documents(rows, counts).tolist() == [(n > 0).sum() for n in lengths.values()]


def test_expected_picks_are_those_of_the_strata(run: Run, shard: Shard) -> None:
    (by_stratum,) = document_counts(run, layer=3)
    counts = standardization.with_expected(by_stratum)
    stratum_t, counted_t = buckets(DOCUMENTS), ~shard.is_special
    doc_t, expert_t = np.repeat(np.arange(len(DOCUMENTS)), shard.lengths), shard.experts[3][:, 0]
    for stratum in np.unique(stratum_t):  # without those of a single label
        if len(set(shard.labels[counted_t & (stratum_t == stratum)])) < 2:
            counted_t &= stratum_t != stratum
    expected = np.zeros((len(DOCUMENTS), 5))
    for stratum in np.unique(stratum_t[counted_t]):
        here = counted_t & (stratum_t == stratum)
        share_e = np.bincount(expert_t[here], minlength=5) / here.sum()
        expected += np.outer(np.bincount(doc_t[here], minlength=len(DOCUMENTS)), share_e)
    assert counts.expected_DE == pytest.approx(expected[counts.doc_D])
    assert counts.picks_DE.sum() == counts.tokens_D.sum() == counted_t.sum()
    table = inference.specialization_test([by_stratum], resamples=10).to_pylist()
    for row in table:
        own = [place for place, (label, _) in enumerate(DOCUMENTS) if label == row["label"]]
        assert row["pooled"] == pytest.approx(expected[own, row["expert"]].sum() / row["n"])


# ---- confounds ----


def confounded(kind: str, effect: bool, folder: Path) -> Path:
    """Two labels whose tokens differ in position (long documents, short ones) or in class, on which the expert depends.

    It depends on nothing else, but with `effect`: ko's tokens then prefer expert 3 in every stratum.
    """
    rng = np.random.default_rng(1)
    lengths = {"en": 40, "ko": 5} if kind == "position" else {"en": 12, "ko": 12}
    documents = [(label, lengths[label]) for label in ("en", "ko") for _ in range(30)]
    named_t = np.repeat([label for label, _ in documents], [length for _, length in documents])
    if kind == "position":
        special_t = buckets(documents) >= 4
        ids_t = np.full(len(named_t), 1)
    else:  # the even ids are of one class, the odd of another
        special_t = rng.random(len(named_t)) < np.where(named_t == "en", 0.8, 0.3)
        ids_t = np.where(special_t, 2, 3)
    p_te = np.where(special_t[:, None], [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1])
    if effect:
        p_te = np.where((named_t == "ko")[:, None], 0.5 * p_te + [0, 0, 0, 0.5], p_te)
    picks = (rng.random((len(p_te), 1)) > np.cumsum(p_te, axis=1)).sum(axis=1)[:, None]
    shard = Shard.of_picks(ONE, documents=documents, experts={0: picks})
    shard = dataclasses.replace(shard, token_ids=ids_t)
    return write_run(folder, ONE, [shard], vocabulary=[("?", False), ("a", False), ("b", False), ("7", False)])


@pytest.mark.parametrize(
    ("kind", "effect"), [("position", False), ("token_class", False), ("position", True)],
    ids=["position", "token class", "language within positions"],
)  # fmt: skip
def test_a_difference_of_the_mix_alone_is_no_difference_of_labels(kind: str, effect: bool, tmp_path: Path) -> None:
    folder = confounded(kind, effect, tmp_path / "run")
    found, low_high, halves = {}, {}, {}
    for match in (None, kind):
        run = open_run(folder, match=match)
        test = inference.specialization_test(document_counts(run), resamples=199, alternative="two-sided").to_pylist()
        found[match] = {row["expert"] for row in test if row["significant"]}
        rows = inference.intervals(run, "reference_difference", reference="en", resamples=200, level=99).to_pylist()
        low_high[match] = {row["expert"]: (row["low"], row["high"]) for row in rows}
        halves[match] = inference.split_half(document_counts(run), splits=50).to_pylist()[3]["value"]
    assert 0 in found[None]
    assert low_high[None][0][1] < 0
    if effect:
        assert 3 in found[kind]
        assert low_high[kind][3][0] > 0.2
        assert halves[kind] > 0.8
    else:
        assert not found[kind]
        assert all(low <= 0 <= high for low, high in low_high[kind].values())
        assert halves[kind] < 0.8 < halves[None]


def test_a_probe_is_not_matched(run: Run) -> None:
    with pytest.raises(ValueError, match="a probe sees whole documents, which are divided here into strata"):
        inference.label_probe(document_counts(run), folds=2)


def test_curves_are_matched(run: Run) -> None:
    curve = inference.sample_size_curve(run, "domain_specialization", layer=3, sizes=[2, 3], resamples=20)
    assert curve.num_rows == 2 * 3 * 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["query", "effective_experts"], "matched on position: 3 labels share "),
        (["query", "loss", "--interval", "95"], "matched on position: 3 labels share "),
        (["test", "--split-half", "--resamples", "20"], "matched on position: 3 labels share "),
        (["test", "--resamples", "20"], "of the tokens are in strata of one label alone, and are left out"),
    ],
)
def test_commands_tell_what_was_matched(arguments: list[str], told: str, folder: Path) -> None:
    command, *rest = arguments
    done = collector(command, str(folder), *rest, "--match", "position")
    assert done.returncode == 0
    assert done.stdout
    assert told in done.stderr
