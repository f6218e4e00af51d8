"""Run a script under FSDP2 on CPU processes: `torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py train_full.py ...`.

Accelerate knows FSDP for GPUs and their like alone; here its state is told that CPU processes are of that kind. All
else is what runs on a GPU: Accelerate's own preparation, PyTorch's fully_shard, the script.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"ACCELERATE_USE_CPU": "true"}
initialise = AcceleratorState.__init__


def initialise_fsdp(self, *arguments, fsdp_plugin=None, **keywords):
    was_initialised = bool(AcceleratorState._shared_state)
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if not was_initialised and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = initialise_fsdp
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
