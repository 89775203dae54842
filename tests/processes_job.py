"""One of two processes of torch.distributed: every method with DistributedDataParallel, some with FSDP2."""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from plain_loops import BATCH, METHODS, Loop
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
folder, rank = Path(sys.argv[1]), dist.get_rank()
for method in METHODS:
    loop = Loop(method, "class", DistributedDataParallel).run(BATCH // 2)
    torch.save({"result": loop.result(), "visited": loop.visited}, folder / f"{method} {rank}.pt")

refused = {}
mesh = dist.init_device_mesh("cpu", (2,)) if hasattr(dist, "init_device_mesh") else None
for method in ("uniform", "prune", "rs2", "infobatch", "σ", "σ, both", "spcl", "batchweight", "dds"):
    try: loop = Loop(method, "class", lambda m: fully_shard(m, mesh=mesh)).run(BATCH // 2)
    except ValueError as e:
        refused[method] = str(e)
        continue
    whole = {k: v.full_tensor() if k.startswith("model") else v for k, v in loop.result().items()}
    torch.save({"result": whole}, folder / f"fsdp {method} {rank}.pt")
if rank == 0: (folder / "refused.json").write_text(json.dumps(refused))
dist.destroy_process_group()
