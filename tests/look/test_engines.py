"""An exported placement is in the engine's own format, whole or not there, and says what it is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from collector.look.export.engines import ENGINES, export_placement
from collector.query.placements.eplb import Cluster
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.command_line import collector
from tests.helpers.synthetic import Shard, components, write_run

LAYERS = (Layer(layer=1, n_experts=4, top_k=1), Layer(layer=2, n_experts=4, top_k=2))
"""Layer 0 has no router."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of ten tokens of en, 4 3 2 1 choose the experts of layer 1 in both halves; ko chooses the last two."""
    picks = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    shard = Shard.of_picks(
        LAYERS, documents=[("en", 10), ("en", 10), ("ko", 2), ("ko", 2)],
        experts={1: [*picks, *picks, 2, 3, 2, 3], 2: [[0, 1]] * 20 + [[2, 3]] * 4},
    )  # fmt: skip
    return write_run(tmp_path_factory.mktemp("engines") / "run", LAYERS, [shard], compute=True)


def exported(folder: Path, tmp_path: Path, *arguments: str) -> Path:
    out = tmp_path / "out"
    done = collector("export", str(folder), str(out), *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208  # hidden ones too
    return out


def test_eplb_gets_what_it_takes_and_what_it_returns(folder, tmp_path) -> None:
    out = exported(folder, tmp_path, "--to", "eplb", "--gpus", "2", "--replicas", "6", "--mix", "en=1")
    weight = np.load(out / "weight.npy")
    assert weight.dtype == np.int64
    assert weight.tolist() == [[400000, 300000, 200000, 100000], [1000000, 1000000, 0, 0]]
    assert (out / "placement.json").read_text() == (
        '{"num_replicas": 6, "num_groups": 1, "num_nodes": 1, "num_gpus": 2, '
        '"routers": [{"stack": "decoder", "layer": 1}, {"stack": "decoder", "layer": 2}], '
        '"phy2log": [[0, 0, 3, 2, 1, 1], [0, 0, 2, 1, 1, 3]], '
        '"log2phy": [[[0, 1], [4, 5], [3, -1], [2, -1]], [[0, 1], [3, 4], [2, -1], [5, -1]]], '
        '"logcnt": [[2, 2, 1, 1], [2, 2, 1, 1]]}\n'
    )
    assert {path.name for path in out.iterdir()} == {"weight.npy", "placement.json", "README.md"}


def test_sglang_gets_one_key_and_a_row_for_every_layer_of_the_model(folder, tmp_path) -> None:
    out = exported(folder, tmp_path, "--to", "sglang", "--gpus", "2", "--replicas", "6", "--mix", "en=1")
    assert (out / "init_expert_location.json").read_text() == (
        '{"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 0, 3, 2, 1, 1], [0, 0, 2, 1, 1, 3]]}\n'
    )
    assert (out / "logical_count.json").read_text() == (
        '{"logical_count": [[0, 0, 0, 0], [400000, 300000, 200000, 100000], [1000000, 1000000, 0, 0]]}\n'
    )
    assert "--ep-num-redundant-experts 2`" in (out / "README.md").read_text()


def test_vllm_ascend_counts_layers_with_experts_from_0(folder, tmp_path) -> None:
    out = exported(folder, tmp_path, "--to", "vllm-ascend", "--gpus", "2", "--mix", "en=1")
    assert (out / "expert_map.json").read_text() == (
        '{"moe_layer_count": 2, "layer_list": ['
        '{"layer_id": 0, "device_count": 2, "device_list": ['
        '{"device_id": 0, "device_expert": [0, 3]}, {"device_id": 1, "device_expert": [1, 2]}]}, '
        '{"layer_id": 1, "device_count": 2, "device_list": ['
        '{"device_id": 0, "device_expert": [0, 2]}, {"device_id": 1, "device_expert": [1, 3]}]}]}\n'
    )


def test_the_card_says_for_what_and_how_balanced(folder, tmp_path) -> None:
    """In order, 4 3 | 2 1 and 1 1 | 0 0; planned, 4 1 | 3 2 and 1 0 | 1 0."""
    done = collector("export", str(folder), str(tmp_path / "out"), "--to", "eplb", "--gpus", "2", "--mix", "en=3,ko=0")
    table = (
        "| layer | before |  after |\n|------:|-------:|-------:|\n|     1 |  0.714 |  1.000 |\n"
        "|     2 |  0.500 |  1.000 |\n|  mean |  0.607 |  1.000 |\n"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert table in done.stdout
    assert card.endswith(table)
    for line in (
        f"- run: {folder}", "- plan hash: 0", "- traffic: en 1",
        "- cluster: GPUs 2, nodes 1, groups of experts 1; all GPUs alike",
        "- loads: picks per million tokens, special tokens left out",
    ):  # fmt: skip
        assert f"{line}\n" in card


def test_a_mix_moves_the_experts(folder, tmp_path) -> None:
    cluster = Cluster(gpus=2)
    loads = [
        export_placement(RunDirectory(folder), str(tmp_path / str(place)), "eplb", cluster, mix=mix)[0].load_LE[0]
        for place, mix in enumerate(({"en": 1.0}, {"en": 0.5, "ko": 0.5}, None))
    ]
    assert [load.tolist() for load in loads] == [
        [400000, 300000, 200000, 100000],
        [200000, 150000, 350000, 300000],
        [333333, 250000, 250000, 166667],
    ]


@pytest.mark.parametrize("to", ENGINES)
def test_an_incomplete_run_has_to_be_asked_for_and_a_taken_folder_is_left_alone(tmp_path, to) -> None:
    shard = Shard.of_picks(LAYERS, documents=[("en", 1)] * 2, experts={1: [0, 1], 2: [[0, 1], [0, 1]]})
    run = RunDirectory(write_run(tmp_path / "run", LAYERS, [shard], complete=False))
    with pytest.raises(ValueError, match="is incomplete; --partial plans with what is committed so far"):
        export_placement(run, str(tmp_path / "out"), to, Cluster(gpus=2))
    export_placement(run, str(tmp_path / "out"), to, Cluster(gpus=2), partial=True)
    assert ", incomplete\n" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export_placement(run, str(tmp_path / "out"), to, Cluster(gpus=2), partial=True)


def test_what_an_engine_has_to_know_is_not_guessed(tmp_path) -> None:
    shard = Shard.of_picks(LAYERS[:1], documents=[("en", 1)] * 2, experts={1: [0, 1]})
    unknown = RunDirectory(write_run(tmp_path / "unknown", LAYERS[:1], [shard], compute=False))
    with pytest.raises(ValueError, match="a row for each layer of the model, and this run does not know how many"):
        export_placement(unknown, str(tmp_path / "out"), "sglang", Cluster(gpus=2))
    some = write_run(tmp_path / "some", LAYERS[:1], [shard], compute=False, settings={"layers": [1]})
    for parts in (None, components(LAYERS)):
        info = json.loads((some / "run.json").read_text()) | {"compute": parts}
        (some / "run.json").write_text(json.dumps(info))
        with pytest.raises(ValueError, match="this run recorded some of them: collect without --layers"):
            export_placement(RunDirectory(some), str(tmp_path / "out"), "vllm-ascend", Cluster(gpus=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some", "unknown"]
    (some / "run.json").write_text(json.dumps(info | {"compute": components(LAYERS[:1])}))
    export_placement(RunDirectory(some), str(tmp_path / "out"), "vllm-ascend", Cluster(gpus=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "eplb"), "--to eplb needs --gpus"),
        (("--to", "csv", "--gpus", "2"), "--gpus is for --to eplb, sglang and vllm-ascend"),
        (("--to", "hf", "--include-special"), "--include-special is for --to eplb"),
        (("--to", "sglang", "--gpus", "2", "--gzip"), "--gzip is for --to csv, not --to sglang"),
        (("--to", "eplb", "--gpus", "2", "--mix", "fr=1"), "no document of this run has the label 'fr'; it has en, ko"),
        (("--to", "eplb", "--gpus", "2", "--mix", "en"), "--mix takes labels with their shares"),
        (("--to", "eplb", "--gpus", "3", "--replicas", "4"), "4 replicas in all .* such as 6"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_status_2(folder, tmp_path, arguments, message) -> None:
    done = collector("export", str(folder), str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    said = " ".join(done.stderr.replace("│", " ").split())
    assert re.search(message, said), said
    assert list(tmp_path.iterdir()) == []
