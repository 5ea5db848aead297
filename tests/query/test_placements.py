"""Placements are EPLB's, and balanced where they can be; loads are those of the traffic that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.data.sources import LABEL_SEPARATOR
from collector.query.placement_plan import plan_placement
from collector.query.placements.balance import balancedness, shares
from collector.query.placements.eplb import Cluster, in_order, rebalance
from collector.query.traffic import Loads, read_mix
from collector.query.warehouse import open_run
from collector.store import tables
from collector.store.tables import Layer
from tests.helpers.query_runs import few_examples
from tests.helpers.reference.load import eplb
from tests.helpers.synthetic import Shard, random_shard, write_run

# ---- EPLB ----


def test_the_published_example_comes_out_as_published() -> None:
    """github.com/deepseek-ai/EPLB, README: two layers, 12 experts in 4 groups, 16 replicas on 2 nodes of 4 GPUs."""
    load = np.array([
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ])  # fmt: skip
    placement = rebalance(load, Cluster(gpus=8, nodes=2, groups=4, replicas=16))
    assert placement.expert_LP.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placement.replicas_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    # in the order of replicas: the second one of expert 1 lies before the first
    assert placement.slots_LEX[0, [0, 1, 5]].tolist() == [[12, -1], [15, 13], [0, 2]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Cluster]:
    """Loads of three layers, many of them equal or 0, and GPUs that can hold the experts."""
    nodes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    gpus, experts = nodes * draw(st.integers(1, 3)), groups * draw(st.integers(1, 4))
    replicas = (-(-experts // gpus) + draw(st.integers(0, 2))) * gpus
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, draw(st.sampled_from([1, 4, 1000])) + 1, (3, experts)), Cluster(
        gpus=gpus, nodes=nodes, groups=groups, replicas=replicas
    )


@few_examples
@given(problem=problems())
def test_every_expert_has_its_slots_and_their_number_is_right(problem) -> None:
    load, cluster = problem
    placement = rebalance(load, cluster)
    experts, slots = load.shape[1], cluster.replicas
    assert placement.expert_LP.shape == (3, slots)
    for expert_p, slots_ex, replicas_e in zip(
        placement.expert_LP, placement.slots_LEX, placement.replicas_LE, strict=True
    ):
        assert replicas_e.tolist() == np.bincount(expert_p, minlength=experts).tolist()
        assert replicas_e.min() >= 1
        for expert, own in enumerate(slots_ex):
            held = own[own >= 0]
            assert sorted(held.tolist()) == np.flatnonzero(expert_p == expert).tolist()
            assert (own[len(held) :] == -1).all()
    share = shares(placement, cluster.gpus)
    assert share.sum(axis=2) == pytest.approx(np.ones((3, experts)))
    assert (share * placement.replicas_LE[:, :, None]).sum(axis=1) == pytest.approx(slots / cluster.gpus)


@few_examples
@given(problem=problems())
def test_without_groups_it_decides_as_one_decision_at_a_time_does(problem) -> None:
    load, cluster = problem
    alike = Cluster(gpus=cluster.gpus, replicas=cluster.replicas)
    for expert_p, load_e in zip(rebalance(load, alike).expert_LP, load.tolist(), strict=True):
        assert expert_p.reshape(cluster.gpus, -1).tolist() == eplb(load_e, cluster.gpus, cluster.replicas)


@few_examples
@given(problem=problems())
def test_a_group_stays_on_one_node_if_groups_divide_evenly(problem) -> None:
    load, cluster = problem
    placement = rebalance(load, cluster)
    if not cluster.is_hierarchical:
        alike = Cluster(gpus=cluster.gpus, replicas=cluster.replicas)
        assert placement.expert_LP.tolist() == rebalance(load, alike).expert_LP.tolist()
        return
    size = load.shape[1] // cluster.groups
    for expert_p in placement.expert_LP:
        node_of = [set((own // size).tolist()) for own in expert_p.reshape(cluster.nodes, -1)]
        assert sum(map(len, node_of)) == cluster.groups
        assert {len(groups) for groups in node_of} == {cluster.groups // cluster.nodes}


@pytest.mark.parametrize(
    ("load", "cluster", "before", "after"),
    [
        ([9, 8, 1, 2], {"gpus": 2}, 10 / 17, 1),  # 9 1 | 8 2 instead of 9 8 | 1 2
        ([5, 5, 5, 5], {"gpus": 2}, 1, 1),
        ([6, 1, 1, 0], {"gpus": 4}, 2 / 6, 2 / 6),  # an expert for each GPU, however they lie
        ([6, 1, 1, 0], {"gpus": 4, "replicas": 8}, 2 / 3.5, 2 / 2.4),  # 0 has five replicas, of which two meet
        ([0, 0, 7, 1], {"gpus": 2}, 1 / 2, 4 / 7),
    ],
)
def test_a_placement_is_at_least_as_balanced_as_experts_in_order(load, cluster, before, after) -> None:
    load_le, cluster = np.array([load]), Cluster(**cluster)
    trivial = in_order(1, 4, cluster.slots(4))
    found = [balancedness(load_le, each, cluster.gpus)[0] for each in (trivial, rebalance(load_le, cluster))]
    assert found[1] >= found[0]
    assert found == [pytest.approx(before), pytest.approx(after)]


def test_it_is_greedy_and_can_be_worse_than_experts_in_order() -> None:
    """All load is expert 0's: three replicas of it go to two GPUs, where in order there are two."""
    load, cluster = np.array([[4, 0, 0, 0]]), Cluster(gpus=2, replicas=6)
    assert balancedness(load, in_order(1, 4, 6), 2) == pytest.approx(1)
    assert balancedness(load, rebalance(load, cluster), 2) == pytest.approx(2 / (8 / 3))


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"gpus": 0}, "gpus takes a number from 1, got 0"),
        ({"gpus": 4, "nodes": 3}, "4 gpus cannot be divided evenly among 3 nodes"),
        ({"gpus": 4, "groups": 5}, "12 experts are not 5 groups of one size"),
        ({"gpus": 5, "replicas": 12}, "12 replicas in all .* 12 experts evenly on 5 gpus: .* such as 15"),
        ({"gpus": 4, "replicas": 8}, "8 replicas in all cannot hold 12 experts .* multiple of 4 .* such as 12"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_remedy(cluster, message) -> None:
    with pytest.raises(ValueError, match=message):
        rebalance(np.ones((1, 12)), Cluster(**cluster))


def test_a_slot_for_each_expert_rounded_up_is_the_default() -> None:
    assert [Cluster(gpus=gpus).slots(12) for gpus in (1, 4, 5, 16)] == [12, 12, 15, 16]


# ---- loads ----

LAYERS = (Layer(layer=1, n_experts=4, top_k=1), Layer(layer=3, n_experts=4, top_k=2))


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """en: 4 tokens in two documents, ko: 6 in two, the second of which is special."""
    shard = Shard.of_picks(
        LAYERS, documents=[("en", 3), ("ko", 4), ("en", 1), ("ko", 2)],
        experts={
            1: [0, 0, 1, 2, 2, 2, 3, 1, 2, 3],
            3: [[0, 1], [0, 1], [0, 2], [2, 3], [2, 3], [3, 2], [1, 3], [0, 3], [2, 1], [0, 1]],
        },
        is_special=[False] * 9 + [True],
    )  # fmt: skip
    return open_run(write_run(tmp_path_factory.mktemp("counted") / "run", LAYERS, [shard]))


def loads(run, mix=None, *, include_special=False) -> Loads:
    return Loads(run, tables.recorded_layers(run.info), mix, include_special=include_special)


def test_loads_are_picks_per_million_tokens(counted) -> None:
    assert loads(counted).of().tolist() == [
        [222222, 222222, 444444, 111111],  # 2 2 4 1 of 9 tokens
        [444444, 444444, 555556, 555556],
    ]
    assert loads(counted, include_special=True).of()[0].tolist() == [200000, 200000, 400000, 200000]


def test_a_mix_weighs_what_each_label_picks_per_token(counted) -> None:
    """The 4 tokens of en pick 2 2 0 0, the 5 of ko 0 0 4 1, whatever there is of each."""
    mix = {"en": 0.75, "ko": 0.25}
    assert loads(counted, mix).of()[0].tolist() == [375000, 375000, 200000, 50000]
    assert loads(counted, {"ko": 1.0}).of()[0].tolist() == [0, 0, 800000, 200000]
    assert loads(counted, mix).of().sum(axis=1).tolist() == [1_000_000, 2_000_000]


def test_halves_are_every_other_document_of_a_label(counted) -> None:
    mix = {"en": 0.5, "ko": 0.5}
    assert loads(counted, mix).of(first=True)[0].tolist() == [333333, 166667, 375000, 125000]
    assert loads(counted, mix).of(first=False)[0].tolist() == [0, 500000, 500000, 0]


def test_a_document_of_several_labels_counts_for_each(tmp_path) -> None:
    both = LABEL_SEPARATOR.join(["en", "ko"])
    shard = Shard.of_picks(
        LAYERS[:1], documents=[("en", 1), (both, 1), ("ko", 2), (both, 2)], experts={1: [0, 1, 2, 2, 3, 3]}
    )
    run = open_run(write_run(tmp_path / "run", LAYERS[:1], [shard]))
    assert loads(run, {"en": 1.0}).of().tolist() == [[250000, 250000, 0, 500000]]
    assert loads(run, {"ko": 1.0}).of().tolist() == [[0, 200000, 400000, 400000]]
    assert loads(run).of().tolist() == [[166667, 166667, 333333, 333333]]


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("en=0.7,ko=0.3", {"en": 0.7, "ko": 0.3}),
        ("en=7, ko=3,fr=0", {"en": 0.7, "ko": 0.3}),
        ('"a,b=1",x=y=3', {"a,b": 0.25, "x=y": 0.75}),
        ("en=1e300", {"en": 1}),
    ],
)
def test_a_mix_is_read_and_adds_up_to_one(text, mix) -> None:
    assert read_mix(text) == pytest.approx(mix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("en", "in eng_Latn=0.7,kor_Hang=0.3; got 'en'"),
        ("", "needs a share above 0, got ''"),
        ("en=0", "needs a share above 0, got 'en=0'"),
        ("en=-1,ko=2", "got 'en=-1'"),
        ("en=nan", "got 'en=nan'"),
        ("en=inf", "got 'en=inf'"),
        ("=1", "got '=1'"),
        ("en=1,en=2", "--mix names en twice"),
    ],
)
def test_what_is_no_mix_is_refused(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_mix(text)


# ---- plans ----


def flat(experts_of_gpus: list[list[int]]) -> list[int]:
    return [expert for own in experts_of_gpus for expert in own]


def numpy_balancedness(load, expert_p, gpus) -> float:
    """One slot after the other."""
    of_gpu = np.zeros(gpus)
    for slot, expert in enumerate(expert_p):
        of_gpu[slot // (len(expert_p) // gpus)] += load[expert] / list(expert_p).count(expert)
    return of_gpu.mean() / of_gpu.max()


@pytest.mark.parametrize("mix", [None, {"en": 0.2, "ko": 0.8}])
def test_a_plan_is_measured_in_documents_that_it_was_not_computed_from(tmp_path, mix) -> None:
    layers = (Layer(layer=0, n_experts=6, top_k=2), Layer(layer=2, n_experts=6, top_k=1))
    documents = [(label, length) for length in range(3, 9) for label in ("en", "ko", "xx")]
    shards = [random_shard(np.random.default_rng(seed), layers, documents) for seed in range(2)]
    run = open_run(write_run(tmp_path / "run", layers, shards))
    plan = plan_placement(run, Cluster(gpus=4), mix=mix)
    for row, one in enumerate(layers):
        first, second, both = (load_of(shards, one, half, mix) for half in ((0,), (1,), (0, 1)))
        before = numpy_balancedness(second, np.arange(8) % 6, 4)
        after = numpy_balancedness(second, flat(eplb(np.rint(first), 4, 8)), 4)
        assert plan.before_L[row] == pytest.approx(before, rel=1e-5)
        assert plan.after_L[row] == pytest.approx(after, rel=1e-5)
        assert plan.load_LE[row].tolist() == np.rint(both).astype(int).tolist()
        assert plan.placement.expert_LP[row].tolist() == flat(eplb(np.rint(both), 4, 8))


def load_of(shards, router, halves, mix) -> np.ndarray:
    """[E] picks per million tokens, document by document."""
    seen: dict[str, int] = {}
    picks: dict[str, np.ndarray] = {}
    for shard in shards:
        start = 0
        for label, length in shard.documents:
            number = seen[label] = seen.get(label, -1) + 1
            kept = ~shard.is_special[start : start + length]
            experts = shard.experts[router.layer][start : start + length][kept]
            if number % 2 in halves:
                counts = np.bincount(experts.ravel().astype(int), minlength=router.n_experts)
                picks[label] = picks.get(label, 0) + counts
            start += length
    if mix is None:
        total = sum(picks.values())
        return 1e6 * total / (total.sum() / router.top_k)
    return sum(share * 1e6 * picks[label] / (picks[label].sum() / router.top_k) for label, share in mix.items())


def test_plans_that_cannot_be_are_refused(counted, tmp_path) -> None:
    with pytest.raises(ValueError, match="no document of this run has the label 'fr'; it has en, ko"):
        plan_placement(counted, Cluster(gpus=2), mix={"fr": 1.0})
    with pytest.raises(ValueError, match="stack 'encoder' is not recorded"):
        plan_placement(counted, Cluster(gpus=2), stack="encoder")
    single = Shard.of_picks(LAYERS[:1], documents=[("en", 1), ("en", 1), ("ko", 2)], experts={1: [0, 1, 2, 2]})
    run = open_run(write_run(tmp_path / "single", LAYERS[:1], [single]))
    assert plan_placement(run, Cluster(gpus=2)).load_LE.sum() == 1_000_000
    with pytest.raises(ValueError, match="label 'ko' needs two documents"):
        plan_placement(run, Cluster(gpus=2), mix={"en": 0.5, "ko": 0.5})
    sizes = (LAYERS[0], Layer(layer=3, n_experts=6, top_k=1))
    other = Shard.of_picks(sizes, documents=[("en", 2)], experts={1: [0, 1], 3: [0, 5]})
    with pytest.raises(ValueError, match="same number of experts, and there are 4 experts in layer 1 and 6 experts"):
        plan_placement(open_run(write_run(tmp_path / "sizes", sizes, [other])), Cluster(gpus=2))


def test_of_several_stacks_one_is_chosen(tmp_path) -> None:
    layers = (Layer(stack="encoder", layer=1, n_experts=4, top_k=1), Layer(layer=1, n_experts=2, top_k=1))
    shard = random_shard(np.random.default_rng(0), layers, [("en", 9), ("en", 9)])
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    with pytest.raises(ValueError, match="the run has routers of decoder and encoder: choose one with --stack"):
        plan_placement(run, Cluster(gpus=2))
    assert plan_placement(run, Cluster(gpus=2), stack="encoder").load_LE.shape == (1, 4)
