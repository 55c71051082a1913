"""What torch.compile breaks its graph at. A file that it alone imports, because `disable` imports the compiler."""

import torch

from hgrn2_kernels.sharded import Sharded

# the operator calls back what may be anything
apply_sharded = torch.compiler.disable(Sharded.apply)
