"""A second recorder beside that of the routing: everything after it takes its table without knowing it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from collector import open_run
from collector.capture.hooks import Capture
from collector.capture.recorder import Hook, Recorder, Recording
from collector.capture.recorders import RECORDERS, recorders_for
from collector.config import CaptureConfig, DataConfig, ModelConfig
from collector.look.export import export
from collector.models.routers import find_routers
from collector.store.run_directory import RunDirectory
from collector.upkeep.verify import verify
from tests.helpers.runs import assert_same_content, collect_here, run_config, write_jsonl

SCHEMA = pa.schema([("shard", pa.uint32()), ("tok", pa.uint32()), ("norm", pa.float32())])


class Output(NamedTuple):
    hidden_th: torch.Tensor


class Norm(NamedTuple):
    norm_t: torch.Tensor


class LastNormRecorder(Recorder):
    """The norm of the model's last hidden states, which needs the whole pass."""

    tables = {"norms": "a token: the norm of its last hidden state"}
    needs_whole_pass = True

    @classmethod
    def schemas(cls, info: Any) -> dict[str, pa.Schema]:  # noqa: ARG003
        return {"norms": SCHEMA}

    def hooks(self) -> list[Hook]:
        return [
            Hook(
                name="norm", module=self.model.norm, stack="decoder",
                read=lambda hidden: Output(hidden.flatten(0, 1)),
                keep=lambda output, _grid: Norm(output.hidden_th.float().norm(dim=-1)),
            )
        ]  # fmt: skip

    def probe(self, kept) -> None:
        assert kept[0].norm_t.shape == (2,)

    def card(self) -> dict[str, Any]:
        return {"norms": "of the last hidden states"}

    def start(self, tokens) -> Recording:
        return ShardNorms(np.full(len(tokens["decoder"].ids), np.nan, np.float32))


@dataclasses.dataclass
class ShardNorms(Recording):
    norm_t: np.ndarray

    def put(self, batch, kept) -> None:
        self.norm_t[batch["decoder"].slots] = kept[0].norm_t.numpy()

    def check(self) -> None:
        if not np.isfinite(self.norm_t).all():
            raise ValueError("norms: tokens without a norm")

    def write(self, folder, shard, text) -> dict[str, int]:  # noqa: ARG002
        tok = np.arange(len(self.norm_t))
        columns = [np.full(len(tok), shard), tok, self.norm_t]
        arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), folder / "norms")
        return {"norms": len(tok)}


@pytest.fixture
def second(monkeypatch) -> None:
    monkeypatch.setitem(RECORDERS, "norms", LastNormRecorder)


@pytest.fixture
def config(tmp_path, tiny_folder):
    texts = write_jsonl(tmp_path / "texts.jsonl", 20)
    data = DataConfig(data=(str(texts),), docs_per_shard=8)
    return run_config(data, ModelConfig(model=str(tiny_folder)), record=("norms",))


def test_the_routing_is_always_recorded_and_alone_unless_told():
    assert list(RECORDERS) == ["routing", "outputs", "loss", "similarity", "vocabulary", "effects"]
    assert CaptureConfig().record == ("routing",)


def test_a_second_recorder_gets_every_token_and_leaves_the_routing_as_it_is(tmp_path, config, tiny_model, monkeypatch):
    capture = dataclasses.replace(config.capture, record=("routing",))
    alone = collect_here(tmp_path / "alone", dataclasses.replace(config, capture=capture), loaded=tiny_model)
    monkeypatch.setitem(RECORDERS, "norms", LastNormRecorder)
    run = collect_here(tmp_path / "both", config, loaded=tiny_model)
    assert_same_content(run, alone)
    opened = open_run(run.root)
    rows = opened.sql("select shard, doc, list(norm order by position) from norms join tokens using (shard, tok) "
                      "group by all order by all").fetchall()  # fmt: skip
    ids = opened.sql("select list(token_id order by position) from tokens group by shard, doc order by shard, doc")
    assert len(rows) == 20
    for (_, _, norms), (document,) in zip(rows, ids.fetchall(), strict=True):
        with torch.inference_mode():
            hidden = tiny_model.model(torch.tensor([document])).last_hidden_state[0]
        np.testing.assert_allclose(norms, hidden.norm(dim=-1).numpy(), rtol=1e-4)


@pytest.mark.usefixtures("second")
def test_verify_and_export_take_the_second_table(tmp_path, config, tiny_model):
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    tokens = sum(commit.tokens for commit in run.commits())
    assert all(commit.rows == 4 * commit.tokens for commit in run.commits())  # three routers, and the norm
    assert verify(run).sound
    assert run.read_json("run.json")["norms"] == "of the last hidden states"
    exported = export(RunDirectory(run.root), str(tmp_path / "hf"), "hf")
    assert exported.rows["norms"] == tokens
    assert "a token: the norm of its last hidden state" in (tmp_path / "hf" / "README.md").read_text()
    run.store.delete(next(run.commits()).files["norms"].path)
    assert not verify(run).sound


@pytest.mark.usefixtures("second")
def test_a_token_that_a_recorder_did_not_get_stops_the_shard(tmp_path, config, tiny_model, monkeypatch):
    monkeypatch.setattr(ShardNorms, "put", lambda *_: None)
    with pytest.raises(ValueError, match="tokens without a norm"):
        collect_here(tmp_path / "run", config, loaded=tiny_model)
    assert RunDirectory(tmp_path / "run").committed_shards() == set()


def test_the_pass_ends_early_only_where_no_recorder_needs_the_rest(tiny_model, monkeypatch):
    ran = []
    handle = tiny_model.model.norm.register_forward_hook(lambda *_: ran.append(True))
    ids = torch.tensor([[3, 4, 5]])
    try:
        monkeypatch.setitem(RECORDERS, "norms", LastNormRecorder)
        for names, expected in ((), False), (("routing", "norms"), True):
            config = CaptureConfig(record=names)
            recorders = recorders_for(tiny_model.model, find_routers(tiny_model.model), config)
            with Capture(tiny_model.model, recorders) as capture:
                ran.clear()
                capture.run(ids, torch.ones_like(ids)).wait()
            assert bool(ran) == expected
    finally:
        handle.remove()
