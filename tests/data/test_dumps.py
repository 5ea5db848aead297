"""Dumps of engines, worked out by hand: which tokens, at which places, with which experts."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from collector.config import ImportConfig
from collector.data.dumps import Dump, Dumped, open_dump
from collector.data.plan import Shard
from collector.data.sources import BadRow
from tests.helpers import dumps
from tests.helpers.dumps import Routed

CONFIG = ImportConfig(model="m", experts=4, docs_per_shard=2)
ONE = Routed(
    id="a", label="en", token_ids=np.array([5, 6, 7, 8]),
    experts=np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 1], [0, 2]], [[2, 0], [1, 3]]]),
)  # fmt: skip
TWO = Routed(id="b", label="ko", token_ids=np.array([9, 5]), experts=np.array([[[3, 0], [0, 1]], [[0, 3], [1, 0]]]))


def shards(dump: Dump) -> list[Shard]:
    return [
        Shard(
            shard=number, source=cut.source, name=cut.name, kind="dump", first_row=cut.first_row, rows=cut.rows,
            offset=cut.offset, keep=None, fingerprint="",
        )
        for number, cut in enumerate(dump.cut())
    ]  # fmt: skip


def read(path: Path, kind: str, config: ImportConfig = CONFIG) -> list[Dumped | BadRow]:
    """All rows, shard by shard, the last shard first: a reader may enter anywhere."""
    dump = open_dump(str(path), kind, config)
    found = {shard.shard: list(dump.read(shard)) for shard in reversed(shards(dump))}
    return [row for number in sorted(found) for row in found[number]]


def told(row: Dumped | BadRow) -> tuple:
    if isinstance(row, BadRow):
        return row.row, row.reason
    return row.id, row.label, row.token_ids.tolist(), row.positions.tolist(), row.experts.tolist()


def whole(document: Routed, tokens: slice = slice(None, -1)) -> tuple:
    places = list(range(len(document.token_ids)))[tokens]
    return document.id, document.label, document.token_ids[tokens].tolist(), places, document.experts[tokens].tolist()


# -- vLLM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lists", "split", "npy"])
def test_vllm_has_all_tokens_but_the_last(tmp_path, how):
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(ONE, 2, how=how), dumps.vllm(TWO, 1, how=how)])
    assert list(map(told, read(path, "vllm"))) == [whole(ONE), whole(TWO)]


def test_choices_of_the_server_are_outputs_and_each_is_a_document(tmp_path):
    record = dumps.vllm(ONE, 2)
    output = record.pop("outputs")[0]
    record["choices"] = [output, output | {"token_ids": [1, 2]}]
    del record["id"], record["label"]
    found = read(dumps.write_lines(tmp_path / "out.jsonl", [record | {"request_id": "r"}]), "vllm")
    assert [(row.id, row.label, row.token_ids.tolist()) for row in found] == [
        ("r:0", "unlabelled", [5, 6, 7]), ("r:1", "unlabelled", [5, 6, 1]),
    ]  # fmt: skip


def test_a_completion_has_the_ids_of_its_prompt_in_each_choice(tmp_path):
    record = dumps.vllm(ONE, 2)
    own = {"prompt_token_ids": record.pop("prompt_token_ids")}
    record["choices"] = [own | output for output in record.pop("outputs")]
    (found,) = read(dumps.write_lines(tmp_path / "out.jsonl", [record]), "vllm")
    assert told(found) == whole(ONE)
    assert found.prompt_tokens == 2


def test_a_row_of_zeros_for_the_last_token_is_none(tmp_path):
    record = dumps.vllm(ONE, 2, how="split")
    record["outputs"][0]["routed_experts"].append(np.zeros((2, 2), int).tolist())
    assert list(map(told, read(dumps.write_lines(tmp_path / "out.jsonl", [record]), "vllm"))) == [whole(ONE)]


def test_a_layer_of_zeros_has_no_router(tmp_path):
    dense = np.insert(ONE.experts, 0, 0, axis=1)
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(Routed(**{**vars(ONE), "experts": dense}), 2)])
    dump = open_dump(str(path), "vllm", CONFIG)
    (row,) = dump.read(shards(dump)[0])
    assert [router.layer for router in dump.routers] == [1, 2]
    assert told(row) == whole(ONE)


def test_lines_are_entered_where_shards_begin_and_compressed_ones_too(tmp_path):
    import gzip

    documents = [Routed(id=f"d{n}", label="en", token_ids=ONE.token_ids + n, experts=ONE.experts) for n in range(5)]
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(one, 2) for one in documents])
    packed = tmp_path / "packed" / "out.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for each in (path, packed):
        assert list(map(told, read(each, "vllm"))) == [whole(one) for one in documents]


def bad_lines() -> list[tuple[str, object]]:
    """Reason -> a line that is unusable for it."""
    good, output = dumps.vllm(ONE, 2), dumps.vllm(ONE, 2)["outputs"][0]
    npy = dumps.npy(ONE.experts[:-1])

    def changed(**fields) -> dict:
        return good | {"outputs": [output | fields]}

    pickled = base64.b64encode(pickle.dumps(ONE.experts)).decode()
    return [
        ("invalid JSON", '{"prompt_token_ids": [1'),
        ("empty line", ""),
        ("not an object", "[1, 2]"),
        ("no routed experts", good | {"outputs": None}),
        ("no routed experts", changed(routed_experts=None)),
        ("no token ids", good | {"prompt_token_ids": None}),
        ("no token ids", good | {"prompt_token_ids": [1, -1]}),
        ("routed experts are cut short or not base64", changed(routed_experts=npy[:-3])),
        ("routed experts are not an array of integers", changed(routed_experts=npy[:-8])),
        ("routed experts are not an array of integers", changed(routed_experts=pickled)),
        ("routed experts are not an array of integers", changed(routed_experts=[[[0, 1], [2]]])),
        ("routed experts are not an array of integers", changed(routed_experts=[[[0.5, 1.5], [2.0, 1.0]]] * 3)),
        ("routed experts are of another number of tokens", changed(routed_experts=ONE.experts[:2].tolist())),
        ("routed experts are of other layers, or of another k, than those before",
         changed(routed_experts=ONE.experts[:3, :1].tolist())),
        ("label is not a string or number", good | {"label": {"a": 1}}),
    ]  # fmt: skip


def test_a_line_that_is_unusable_costs_a_row_with_its_reason(tmp_path):
    bad = bad_lines()
    path = dumps.write_lines(
        tmp_path / "out.jsonl", [dumps.vllm(TWO, 1), *(line for _, line in bad), dumps.vllm(ONE, 2)]
    )
    found = list(map(told, read(path, "vllm")))
    assert found == [whole(TWO), *((row, reason) for row, (reason, _) in enumerate(bad, 1)), whole(ONE)]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([[[0, 4], [2, 3]]], "chooses expert 4 in layer 0, which has experts 0 to 3: --experts"),
        ([[[0, -3], [2, 3]]], "1 of 3 tokens of document a have no routing"),
        ([[[0, 0], [0, 0]]], "--lost drop leaves them out"),
    ],
)
def test_ids_that_are_no_choice_end_the_import(tmp_path, experts, message):
    wrong = np.concatenate([ONE.experts[:1], experts, ONE.experts[2:]])
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(Routed(**{**vars(ONE), "experts": wrong}), 2)])
    with pytest.raises(ValueError, match=message):
        read(path, "vllm")


def test_lost_tokens_are_left_out_and_the_others_stay_where_they_are(tmp_path):
    lost = np.concatenate([ONE.experts[:1], np.zeros((1, 2, 2), int), ONE.experts[2:]])
    gone = np.zeros((2, 2, 2), int)
    documents = [Routed(**{**vars(ONE), "experts": lost}), Routed(**{**vars(TWO), "experts": gone})]
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(one, 1) for one in documents])
    config = ImportConfig(model="m", experts=4, lost="drop")
    first, second = read(path, "vllm", config)
    assert told(first) == ("a", "en", [5, 7], [0, 2], [ONE.experts[0].tolist(), ONE.experts[2].tolist()])
    assert told(second) == (1, "no token with routing")


def test_with_one_expert_a_token_only_zeros_everywhere_is_lost(tmp_path):
    experts = np.array([[[1], [0]], [[0], [0]], [[0], [1]], [[0], [0]]])
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(Routed(**{**vars(ONE), "experts": experts}), 2)])
    with pytest.raises(ValueError, match="1 of 3 tokens"):
        read(path, "vllm")
    (row,) = read(path, "vllm", ImportConfig(model="m", experts=4, lost="drop"))
    assert row.positions.tolist() == [0, 2]


def test_responses_need_what_they_do_not_tell(tmp_path):
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(ONE, 2)])
    with pytest.raises(ValueError, match="--experts: responses do not tell"):
        open_dump(str(path), "vllm", ImportConfig(model="m"))
    with pytest.raises(ValueError, match="--top-k: routing that SGLang returns"):
        open_dump(str(path), "sglang", CONFIG)
    path = dumps.write_lines(tmp_path / "none.jsonl", [{"prompt_token_ids": [1]}])
    with pytest.raises(ValueError, match="holds no routing: 1 lines with no routed experts"):
        read(path, "vllm")


# -- SGLang, responses -------------------------------------------------------------------------------

FLAT = ImportConfig(model="m", experts=4, top_k=2)


def test_sglang_returns_positions_from_the_first_that_was_asked_for(tmp_path):
    path = dumps.write_lines(tmp_path / "out.jsonl", [dumps.sglang(ONE, 2), dumps.sglang(ONE, 2, first=1)])
    first, second = read(path, "sglang", FLAT)
    assert told(first) == whole(ONE)
    assert told(second) == whole(ONE, slice(1, -1))


def test_bytes_that_do_not_fit_the_tokens_are_refused(tmp_path):
    short = dumps.sglang(ONE, 2)
    flat = base64.b64decode(short["meta_info"]["routed_experts"])
    half = short | {"meta_info": {"routed_experts": base64.b64encode(flat[: len(flat) // 2]).decode()}}
    cut = short | {"meta_info": {"routed_experts": short["meta_info"]["routed_experts"][:-2]}}
    path = dumps.write_lines(tmp_path / "out.jsonl", [short, half, cut, short | {"meta_info": None}])
    assert [told(row)[1] for row in read(path, "sglang", FLAT)[1:]] == [
        "routed experts are of other layers, or of another k, than those before",
        "routed experts are cut short or not base64",
        "no routed experts",
    ]


# -- SGLang, recorder --------------------------------------------------------------------------------

# Layer 0 has no router. Layer 1 holds logical expert e at e, and a copy of 0 at 4; layer 2 is turned round.
TO_LOGICAL = np.array([[0, 1, 2, 3, 0], [0, 1, 2, 3, 0], [3, 2, 1, 0, 3]])
TO_PHYSICAL = np.array([[0, 1, 2, 3], [4, 1, 2, 3], [3, 2, 1, 0]])


def recorded(documents, **given) -> dict:
    return dumps.recorded_pass(documents, 3, (1, 2), TO_PHYSICAL, **given)


def test_what_a_pass_extends_is_a_document_and_ids_are_logical(tmp_path):
    name = dumps.write_recorder(tmp_path / "dump", 0, [recorded([ONE, TWO]), recorded([TWO], first=7)], TO_LOGICAL).name
    dumps.write_recorder(tmp_path / "dump", 1, [recorded([TWO])], TO_LOGICAL)
    dump = open_dump(str(tmp_path / "dump"), "sglang", ImportConfig(model="m", docs_per_shard=2))
    first, second, third, fourth = (row for shard in shards(dump) for row in dump.read(shard))
    every = slice(None)
    assert [(router.layer, router.n_experts, router.top_k) for router in dump.routers] == [(1, 4, 2), (2, 4, 2)]
    assert told(first) == (f"{name}#0.0", "unlabelled", *whole(ONE, every)[2:])
    assert told(second) == (f"{name}#0.1", "unlabelled", *whole(TWO, every)[2:])
    assert third.positions.tolist() == [7, 8]
    assert fourth.id == f"{name.replace('_0.pt', '_1.pt')}#0.0"


def test_decoded_tokens_belong_to_nobody(tmp_path):
    path = dumps.write_recorder(tmp_path, 0, [recorded([ONE]), recorded([TWO], first=4, decode=True)], TO_LOGICAL)
    dump = open_dump(str(path), "sglang", ImportConfig(model="m"))
    assert [len(list(dump.read(shard))) for shard in shards(dump)] == [1]
    assert "2 tokens were decoded" in dump.notes()[0]
    alone = read(path, "sglang", ImportConfig(model="m", decode="alone"))
    assert [row.positions.tolist() for row in alone] == [[0, 1, 2, 3], [4], [5]]


def test_a_token_without_experts_is_lost(tmp_path):
    padded = recorded([ONE])
    padded["topk_ids_of_layer"][:, 1] = -1
    path = dumps.write_recorder(tmp_path, 0, [padded], TO_LOGICAL)
    with pytest.raises(ValueError, match="1 of 4 tokens"):
        read(path, "sglang", ImportConfig(model="m"))
    (row,) = read(path, "sglang", ImportConfig(model="m", lost="drop"))
    assert row.positions.tolist() == [0, 2, 3]


def change(record: dict, layer: int, token: int, ids: list[int]) -> dict:
    record["topk_ids_of_layer"][layer, token, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return record


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([change(recorded([ONE]), 1, 2, [5, 1])], "physical expert 5 of layer 1 is not in the map"),
        ([change(recorded([ONE]), 1, 2, [1, -1])], r"tokens of layer 1 have \[1, 2\] experts"),
        ([recorded([ONE]), change(recorded([TWO]), 0, 0, [1, 2])], "pass 1 has other layers with experts"),
        ([recorded([ONE]) | {"extend_seq_lens": [3]}], "adds up to 3 tokens, and there are 4 positions"),
        ([recorded([ONE]) | {"input_ids": [1]}], "for 1 input ids and 4 positions"),
        ([{"forward_pass_id": 0, "global_physical_count": torch.zeros(3, 5), "positions": []}], "mode per_pass"),
        ([], "holds no token"),
    ],
)  # fmt: skip
def test_passes_that_contradict_themselves_are_refused(tmp_path, passes, message):
    path = dumps.write_recorder(tmp_path, 0, passes, TO_LOGICAL)
    with pytest.raises(ValueError, match=message):
        read(path, "sglang", ImportConfig(model="m"))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"logical_count": torch.zeros(1, 3, 4), "rank": 0}, "mode stat"),
        ({"records": [Evil()], "last_physical_to_logical_map": torch.zeros(1)}, "could run any code"),
        ([1], "is no dump of SGLang's expert distribution recorder"),
    ],
)
def test_files_that_are_no_dump_of_tokens_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "expert_distribution_recorder_1_0.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read(path, "sglang", ImportConfig(model="m"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        read(path, "sglang", ImportConfig(model="m"))
    assert not Path("evil").exists()


def test_experts_that_the_map_contradicts_are_refused(tmp_path):
    path = dumps.write_recorder(tmp_path, 0, [recorded([ONE])], TO_LOGICAL)
    with pytest.raises(ValueError, match=r"--experts 8: the map of .* has 4 logical experts"):
        read(path, "sglang", ImportConfig(model="m", experts=8))


# -- FLAME -------------------------------------------------------------------------------------------


def flame(model: Path, tokens: int = 11) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    token_ids = rng.integers(0, 100, tokens)
    experts = np.argsort(rng.random((tokens, 2, 8)), axis=2)[:, :, :3]
    scores = -np.sort(-rng.random((tokens, 2, 3)), axis=2) / 4
    return dumps.write_flame(model, token_ids, experts, scores), token_ids, experts, scores.astype(np.float16)


def test_blocks_of_tokens_are_documents_across_files_and_row_groups(tmp_path):
    path, token_ids, experts, scores = flame(tmp_path / "flame-moe-290m")
    config = ImportConfig(model="m", experts=8, tokens_per_document=3, docs_per_shard=2)
    found = read(path, "flame", config)
    assert [row.id for row in found] == [f"iter_0540#{number}" for number in range(4)]
    assert [row.positions.tolist() for row in found] == [[0, 1, 2]] * 3 + [[0, 1]]
    assert np.concatenate([row.token_ids for row in found]).tolist() == token_ids.tolist()
    assert np.concatenate([row.experts for row in found]).tolist() == experts.tolist()
    assert np.concatenate([row.probabilities for row in found]).tolist() == scores.tolist()
    dump = open_dump(str(path), "flame", config)
    shards(dump)
    assert [(router.layer, router.n_experts, router.top_k) for router in dump.routers] == [(2, 8, 3), (3, 8, 3)]


def test_layers_that_do_not_fit_the_samples_are_refused(tmp_path):
    path, *_ = flame(tmp_path / "a")
    pq.write_table(pq.read_table(path / "layer_03.parquet").slice(1), path / "layer_03.parquet")
    with pytest.raises(ValueError, match=r"layer_03\.parquet has 10 rows, the samples have 11 tokens"):
        read(path, "flame")
    with pytest.raises(ValueError, match=r"is no checkpoint of FLAME-MoE-Traces: .*\(0 found\)"):
        open_dump(str(tmp_path), "flame", CONFIG)
    path, *_ = flame(tmp_path / "b")
    data = (path / "layer_02.parquet").read_bytes()
    (path / "layer_02.parquet").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"layer_02\.parquet cannot be read"):
        open_dump(str(path), "flame", CONFIG)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("indices", [1, 2], "has 2 to 3 experts, the first one 3"),
        ("indices", [1, 2, 9], "chooses expert 9"),
        ("scores", [0.9, 0.8, 0.1], "scores are no probabilities"),
        ("scores", [0.9, np.nan, 0.1], "scores are no probabilities"),
    ],
)
def test_tokens_that_contradict_the_format_are_refused(tmp_path, column, value, message):
    path, *_ = flame(tmp_path / "m")
    table = pq.read_table(path / "layer_02.parquet")
    rows = table[column].to_pylist()
    rows[5] = value
    place = table.schema.get_field_index(column)
    array = pa.array([np.array(row, np.float16) for row in rows] if column == "scores" else rows, table[column].type)
    pq.write_table(table.set_column(place, table.schema.field(column), array), path / "layer_02.parquet")
    with pytest.raises(ValueError, match=message):
        read(path, "flame", ImportConfig(model="m", experts=8, tokens_per_document=4))


def test_a_dump_that_is_not_there_is_named(tmp_path):
    for kind in ("vllm", "sglang"):
        with pytest.raises(ValueError, match="nowhere"):
            open_dump(str(tmp_path / "nowhere.jsonl"), kind, FLAT)
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="responses are read from JSON lines"):
        open_dump(str(tmp_path / "a.csv"), "vllm", FLAT)
