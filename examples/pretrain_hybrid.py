"""Pretrain Megatron's HybridModel from the installed wheels. pretrain_gpt.py does the same for a GPT.

    torchrun --nproc_per_node N -m hgrn2_megatron examples/pretrain_hybrid.py --spec hgrn2_megatron.spec hgrn2_stack \
        --hybrid-layer-pattern 'M-M-M-*-' <any Megatron flag>
"""

import pretrain_gpt
from megatron.training.argument_utils import hybrid_config_from_args

if __name__ == "__main__":
    pretrain_gpt.main(hybrid_config_from_args)
