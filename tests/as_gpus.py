"""
Runs a script with accelerate taking CPU processes, connected by gloo, for GPUs: on CPUs it knows neither FSDP nor DeepSpeed.

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml tests/as_gpus.py SCRIPT [ARGUMENTS]
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__.clear()  # nothing is compiled
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.argv.pop(0)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
