"""The functions at which torch.compile breaks its graph.

They have a file of their own because `torch.compiler.disable` imports the compiler.
"""

import torch

from hgrn2_kernels.sharded import Sharded

# the operator calls a function of the caller, which may do anything
apply_sharded = torch.compiler.disable(Sharded.apply)
