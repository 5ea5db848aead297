"""How many replicas fit which nodes: arithmetic over what Ray says of a cluster."""

from __future__ import annotations

import pytest

from collector.config import LaunchConfig
from collector.fleet.placement import Need, Node, require_room


def node(cpus: float, gpus: float = 0, *, name: str = "n", kind: str | None = None, **labels: str) -> Node:
    resources = {"CPU": cpus, "GPU": gpus, "memory": 1e9} | ({f"accelerator_type:{kind}": 1.0} if kind else {})
    return Node.of({"NodeID": name, "NodeManagerHostname": name, "Resources": resources,
                    "Labels": {key.replace("_", "-"): value for key, value in labels.items()}})  # fmt: skip


def test_on_cpus_each_node_gets_one_replica_with_all_its_cores():
    need = Need.of(LaunchConfig(), "cpu")
    small, large, head = node(1), node(64), node(0)
    assert [need.slots(each) for each in (small, large, head)] == [1, 1, 0]
    assert (need.cpus_on(small), need.cpus_on(large)) == (1, 64)
    assert need.elsewhere([small, large, head]) == 1, "to come: as large as the smallest"
    assert need.elsewhere([head]) is None
    assert Need.of(LaunchConfig(cpus_per_replica=4), "cpu").slots(large) == 16


@pytest.mark.parametrize(
    ("gpus_per_replica", "cpus", "gpus", "slots"),
    [(1, 16, 8, 8), (1, 4, 8, 4), (0.25, 16, 2, 8), (0.1, 16, 1, 10), (0.3, 16, 1, 3), (4, 16, 8, 2), (4, 16, 3, 0),
     (1, 16, 0, 0)],
)  # fmt: skip
def test_on_gpus_each_node_gets_what_its_gpus_and_cores_hold(gpus_per_replica, cpus, gpus, slots):
    assert Need.of(LaunchConfig(gpus_per_replica=gpus_per_replica), "cuda").slots(node(cpus, gpus)) == slots


def test_nodes_with_different_numbers_of_gpus_add_up():
    need = Need.of(LaunchConfig(gpus_per_replica=2), "cuda")
    assert need.room([node(8, 8), node(8, 5), node(8, 1), node(64)]) == 4 + 2


def test_an_accelerator_type_admits_only_its_nodes():
    need = Need.of(LaunchConfig(accelerator_type="H100"), "cuda")
    assert need.room([node(8, 8, kind="H100"), node(8, 8, kind="A100"), node(8, 8)]) == 8


@pytest.mark.parametrize(
    ("selector", "spot", "on_demand", "unlabelled"),
    [("market-type=spot", 1, 0, 0), ("market-type=!spot", 0, 1, 1), ("market-type=in(spot, reserved)", 1, 0, 0),
     ("market-type=!in(spot,reserved)", 0, 1, 1)],
)  # fmt: skip
def test_label_selectors_mean_what_they_mean_to_ray(selector, spot, on_demand, unlabelled):
    need = Need.of(LaunchConfig(node_labels=(selector,)), "cpu")
    nodes = node(4, market_type="spot"), node(4, market_type="on-demand"), node(4)
    assert [need.slots(each) for each in nodes] == [spot, on_demand, unlabelled]


def test_too_small_a_cluster_is_refused_and_its_nodes_are_named():
    need = Need.of(LaunchConfig(cpus_per_replica=8, node_labels=("zone=a",)), "cpu")
    with pytest.raises(ValueError, match=r"no node has room .* 8 CPUs and the label zone=a \(nodes: w1 4 CPUs, 0 GPUs"):
        require_room(need, [node(4, name="w1", zone="a"), node(64, name="w2", zone="b")], 1)
    with pytest.raises(ValueError, match="the nodes hold 1 of 3 replicas"):
        require_room(need, [node(8, zone="a")], 3)
    require_room(need, [], 0)
    with pytest.raises(ValueError, match="--cpus-per-replica is needed"):
        require_room(Need.of(LaunchConfig(), "cpu"), [], 0)


@pytest.mark.parametrize(("given", "range_"), [("auto", (1, None)), (4, (1, 4)), ("4", (1, 4)), ("2:8", (2, 8)),
                                               ("0:16", (0, 16))])  # fmt: skip
def test_replicas_are_a_number_or_a_range(given, range_):
    assert LaunchConfig(replicas=given).replica_range() == range_


@pytest.mark.parametrize("given", [0, -1, "0", "5:2", "0:0", "many", "1:2:3", ":4", "4:"])
def test_other_replicas_are_refused_with_the_value(given):
    with pytest.raises(ValueError, match=f"auto, N or MIN:MAX.*{given}"):
        LaunchConfig(replicas=given)


def test_a_label_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"KEY=VALUE.*'zone'"):
        LaunchConfig(node_labels=("zone",))
