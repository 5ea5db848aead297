"""Maps of what experts put out."""

from __future__ import annotations

import builtins
import json
import shutil

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from collector import open_run
from collector.config import DataConfig, ModelConfig
from collector.store.run_directory import RunDirectory
from collector.upkeep import maps
from collector.upkeep.verify import verify
from tests.helpers.command_line import collector
from tests.helpers.runs import collect_here, run_config, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, tiny_model):
    folder = tmp_path_factory.mktemp("maps")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 16)),), docs_per_shard=8)
    config = run_config(data, ModelConfig(model=str(tiny_folder)), record=("similarity",), sample_tokens=200)
    return collect_here(folder / "run", config, loaded=tiny_model)


@pytest.fixture
def copy(run, tmp_path):
    return RunDirectory(shutil.copytree(run.root, tmp_path / "copy"))


def rows(run, method):
    found = open_run(run.root).sql(f"from maps where method = '{method}' order by stack, layer, shard, tok, expert")
    return found.to_arrow_table().to_pandas()


def test_principal_components_are_those_of_the_directions(copy) -> None:
    (made,) = maps.make(copy, layer=1, method="pca")
    outputs = open_run(copy.root).sql(
        "select output from projections where layer = 1 order by shard, tok, expert"
    ).to_arrow_table().to_pandas()["output"]  # fmt: skip
    x = np.stack(outputs).astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x -= x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    got = rows(copy, "pca")
    assert made.points == made.outputs == len(x) == len(got) == 2 * 25 * 2
    for i, axis in enumerate("xy"):
        expected = u[:, i] * s[i]
        np.testing.assert_allclose(got[axis] * np.sign(got[axis] @ expected), expected, atol=1e-4)
    assert made.trustworthiness == pytest.approx(trust(x, got[["x", "y"]].to_numpy(), 15), abs=1e-3)
    assert set(got.trustworthiness) == {np.float32(made.trustworthiness)}
    assert verify(copy).sound


def trust(x, y, k):
    """Venna and Kaski 2001, by hand."""
    n = len(x)
    ranks, nearest = (np.argsort(np.argsort(cdist(each, each), axis=1), axis=1) for each in (x, y))
    penalty = sum(ranks[i, j] - k for i in range(n) for j in range(n) if 0 < nearest[i, j] <= k and ranks[i, j] > k)
    return 1 - 2 / (n * k * (2 * n - 3 * k - 1)) * penalty


@pytest.mark.slow
def test_umap_and_tsne_come_with_principal_components_and_repeat_under_a_seed(copy) -> None:
    for method in ("umap", "tsne"):
        first = [each.file for each in maps.make(copy, layer=0, method=method, points=60, seed=3)]
        assert first == [f"maps/decoder-0-{method}.parquet", "maps/decoder-0-pca.parquet"]
        before = rows(copy, method)
        maps.make(copy, layer=0, method=method, points=60, seed=3)
        assert before.equals(rows(copy, method))
        assert set(before.seed) == {3}
        assert len(before) == 60
        assert np.isfinite(before[["x", "y"]]).all(axis=None)
        drawn = before[["shard", "tok", "expert"]]
        assert drawn.equals(rows(copy, "pca")[["shard", "tok", "expert"]]), "the same points"


def test_the_command_says_what_it_made(copy) -> None:
    done = collector("map", str(copy.root), "--layer", "1", "--method", "pca")
    assert done.returncode == 0, done.stderr
    assert "maps/decoder-1-pca.parquet: 100 of 100 outputs, trustworthiness 0." in done.stdout
    shown = collector("query", str(copy.root), "expert_map", "--format", "csv", "--expert", "2")
    assert {line.split(",")[:3].count("1") for line in shown.stdout.splitlines()[1:]} == {1}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layer": 7}, r"--layer 7: not recorded; the run has \[0, 1, 2\]"),
        ({"layer": 1, "stack": "encoder"}, "--stack encoder: layer 1 is in decoder"),
    ],
)
def test_what_is_not_there_is_named(run, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        maps.make(run, **asked)


def test_a_run_without_outputs_and_a_missing_package_are_named(copy, monkeypatch) -> None:
    info = json.loads(copy.store.read("run.json"))
    info["config"]["record"] = ["routing"]
    copy.store.put("run.json", json.dumps(info).encode())
    with pytest.raises(ValueError, match="needs what --record similarity keeps"):
        maps.make(copy, layer=1)
    real = builtins.__import__

    def without_umap(name, *args, **kwargs):
        if name == "umap":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_umap)
    with pytest.raises(ValueError, match=r"pip install 'moe-routing-collector\[map\]'"):
        maps.make(copy, layer=1)
