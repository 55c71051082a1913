"""The arguments of the operator that all of its passes take, in one tuple."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The checked inputs of one call of `chunk_hgrn2`, whose docstring gives shapes and dtypes.

    A tuple costs less time per launch than a dataclass, and unpacks into the flat arguments of torch.library.

    Attributes:
        q, f, v: the raw query and forget-gate projections, and the values.
        lower_bound: the bound of the forget gate; None for a bound of 0.
        initial_state: the states before the first tokens; None for zeros.
        cu_seqlens: the boundaries of packed sequences; None where each row of the batch is a sequence.
        scale: the factor on the output.
    """

    q: Tensor
    f: Tensor
    v: Tensor
    lower_bound: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
