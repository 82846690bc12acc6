"""Groups of processes that the caller of the toolkit creates and destroys."""

import torch.distributed as dist

from detection.core import distributed


def test_a_second_default_group_gets_its_own_cpu_group(tmp_path, monkeypatch):
    """As with nccl, where tensors on the CPU need a gloo group beside the default one."""
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    for number in range(2):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/{number}", rank=0, world_size=1)
        try:
            with distributed.session("cpu"):
                assert dist.get_process_group_ranks(distributed._cpu_group()) == [0]
                reduction = distributed.DelayedMax()
                assert reduction.start([1.0, 2.0]) is None and reduction.finish() == [1.0, 2.0]
        finally:
            dist.destroy_process_group()
