"""The same run on a GPU: placed by Ray, copied back through pinned memory, equal to the CPU's run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collector import driver
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig
from tests.runs import collect_here, content, run_config

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
