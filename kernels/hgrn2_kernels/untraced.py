"""Functions at which torch.compile breaks its graph.

They have a file of their own because `torch.compiler.disable` imports the compiler.
"""

import torch

from hgrn2_kernels.sharded import Sharded

# the operator calls back what may be anything
apply_sharded = torch.compiler.disable(Sharded.apply)
