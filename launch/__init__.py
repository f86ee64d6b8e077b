"""From a command to running processes. Importing this package does not import torch.

    exit_code = launch.run("sft", argv, "mcore_swift.cli.sft:train")

starts the processes that the environment asks for (NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT), joins those that torchrun or srun has started, or runs in this process alone.
"""

from .environment import Place, read_place, world_size_from_env
from .run import in_this_process, run

__all__ = ["Place", "in_this_process", "read_place", "run", "world_size_from_env"]
