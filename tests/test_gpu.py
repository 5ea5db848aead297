"""The same run on a GPU: placed by Ray, copied back through pinned memory, equal to the CPU's run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collector.capture import batches
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig
from collector.fleet import driver
from collector.models import heads, loading
from collector.models.routers import find_routers
from tests.helpers.capturing import router_capture
from tests.helpers.generating import assert_same_routing, write
from tests.helpers.runs import collect_here, content, run_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_gpu_run_routes_like_a_cpu_run(tmp_path):
    data, model = DataConfig(per_label=2), ModelConfig(dtype="float32")
    capture = CaptureConfig(tokens_per_batch=4096)
    run = driver.collect(
        str(tmp_path / "gpu"), data=data, model=model, capture=capture, launch=LaunchConfig(device="cuda")
    )
    here = collect_here(tmp_path / "cpu", run_config(data, model, tokens_per_batch=4096))
    gpu, cpu = (content(each)["routing"].to_pandas() for each in (run, here))
    assert len(gpu) == len(cpu)
    experts = [f"e{i}" for i in range(8)]
    clear = cpu.margin > 1e-4
    assert clear.mean() > 0.8
    same = (np.sort(gpu.loc[clear, experts]) == np.sort(cpu.loc[clear, experts])).all(1)
    assert same.mean() > 0.999
    np.testing.assert_allclose(gpu.entropy, cpu.entropy, atol=5e-3)


def test_two_replicas_share_one_gpu(tmp_path):
    launch = LaunchConfig(device="cuda", replicas=2, gpus_per_replica=0.5)
    data = DataConfig(per_label=4, docs_per_shard=16)
    run = driver.collect(str(tmp_path / "run"), data=data, model=ModelConfig(), capture=CaptureConfig(), launch=launch)
    assert (tmp_path / "run" / "_SUCCESS").exists()
    assert len(content(run)["documents"]) == 240


def test_4_bits_on_a_gpu_hold_the_same_values_as_on_a_cpu():
    config = ModelConfig(dtype="float32", quantization="nf4")
    gpu, cpu = loading.load(config, "cuda"), loading.load(config, "cpu")
    a, b = gpu.model.state_dict(), cpu.model.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        if key.endswith("absmax"):  # scales of blocks, in 8 bits themselves where they are integers
            atol = 1.0 if a[key].dtype == torch.uint8 else 1e-5
            torch.testing.assert_close(a[key].cpu().float(), b[key].float(), atol=atol, rtol=1e-5)
        else:
            assert (a[key].cpu() == b[key]).float().mean() > 0.999, key
    ids = torch.randint(3, 8000, (4, 64))
    with torch.inference_mode():
        torch.testing.assert_close(gpu.model(ids.cuda())[0].cpu(), cpu.model(ids)[0], atol=2e-2, rtol=2e-2)


def test_a_quantized_run_through_ray(tmp_path):
    model = ModelConfig(dtype="bfloat16", quantization="nf4")
    data = DataConfig(per_label=2, docs_per_shard=16)
    run = driver.collect(str(tmp_path / "run"), data=data, model=model, capture=CaptureConfig(),
                         launch=LaunchConfig(device="cuda"))  # fmt: skip
    assert (tmp_path / "run" / "_SUCCESS").exists()
    memory = run.read_json("run.json")["memory"]
    assert memory["treatments"]["nf4"]["parameters"] > memory["treatments"]["bfloat16"]["parameters"]
    assert memory["compute_dtype"] == "bfloat16"


def test_what_a_gpu_writes_is_routed_like_the_text_read_as_a_whole():
    config = ModelConfig(dtype="float32")
    loaded = loading.load(config, "cuda")
    prompts = [loaded.tokenizer(text).input_ids for text in ("The capital of France is", "서울은", "I")]
    table, written, whole = write(
        loaded.model, prompts, head=heads.load_head(config, loaded), stop_ids=range(0, 8000, 20), generate=16,
        tokens_per_batch=1024, temperature=1.0,
    )  # fmt: skip
    assert (table.lengths > table.prompt_lengths).all()
    assert_same_routing(written, whole, rounding=1e-4)


def test_a_captured_pass_never_waits_for_the_device():
    """Torch raises at any synchronisation between the call and the wait."""
    loaded = loading.load(ModelConfig(dtype="bfloat16"), "cuda")
    texts = ["One sentence.", "And another one, which is a little longer than the first."]
    table = batches.tokenize(loaded.tokenizer, texts, 64)
    batch = batches.pad(table, np.arange(2), loaded.pad_id)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with router_capture(loaded.model, find_routers(loaded.model), device=loaded.device) as capture:
        capture.run(ids, mask).wait()[0]
        torch.cuda.set_sync_debug_mode("error")
        try:
            decisions = capture.run(ids, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(decisions.wait()) == 8


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    """Only so much of the GPU is given to this process that large batches fail."""
    config = run_config(DataConfig(per_label=8), ModelConfig(), tokens_per_batch=65536)  # one batch
    config = type(config)(data=config.data, model=config.model, capture=config.capture, device="cuda")
    loaded = loading.load(config.model, "cuda")
    with torch.inference_mode():
        loaded.model(torch.ones((1, 8), dtype=torch.long, device="cuda"))  # libraries take their working memory
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 48 * 2**20) / total))
    try:
        run = collect_here(tmp_path / "run", config, loaded=loaded)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(commit.halved for commit in run.commits()) > 0
    assert len(content(run)["documents"]) == 480


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_a_replica_over_two_gpus_routes_like_one_on_one(tmp_path):
    data, model, capture = DataConfig(per_label=2), ModelConfig(dtype="float32"), CaptureConfig()
    runs = [driver.collect(str(tmp_path / str(gpus)), data=data, model=model, capture=capture,
                           launch=LaunchConfig(device="cuda", replicas=1, gpus_per_replica=gpus))
            for gpus in (1, 2)]  # fmt: skip
    one, two = (content(run)["routing"].to_pandas() for run in runs)
    assert (one.e0 == two.e0).mean() > 0.999
