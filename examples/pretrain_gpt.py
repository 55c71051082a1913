"""Pretrain a GPT with Megatron's own training loop, from the installed wheels and without a Megatron-LM checkout.

    torchrun --nproc_per_node N -m hgrn2_megatron examples/pretrain_gpt.py --spec hgrn2 <any Megatron flag>

The script takes every flag of Megatron-LM's pretrain_gpt.py, except flags for data other than plain text. It refuses
those.
"""

import functools
import os

import megatron.core.datasets.utils as dataset_utils
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import broadcast_data
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

try:
    from megatron.training.argument_utils import gpt_config_from_args
except ImportError:
    # the training loop of megatron-core 0.18 takes a function that builds the model
    gpt_config_from_args = None

# Megatron's attributes for data other than plain text
NOT_HERE = (
    "sft",
    "fim_data",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "logits_load_dir",
)
INTEGERS = ["tokens", "labels", "position_ids"]


def get_batch(data_iterator):
    """Return the next micro-batch on every TP rank.

    It holds tokens, labels and position_ids [b, s] int64, and loss_mask [b, s] fp32.
    """
    data = next(data_iterator) if data_iterator is not None else None
    if mpu.get_tensor_model_parallel_world_size() == 1:
        # Nothing here waits for the device, so a CUDA graph can capture it.
        batch = {name: data[name].cuda(non_blocking=True) for name in (*INTEGERS, "loss_mask")}
    else:
        batch = broadcast_data(INTEGERS, data, torch.int64) | broadcast_data(["loss_mask"], data, torch.float32)
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(
            batch | {"cu_seqlens": None}, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
    return batch


def loss_func(loss_mask, losses):
    """Return the sum of the token losses, the number of tokens, and both for the log, in the order Megatron expects."""
    loss = (losses.float().view(-1) * loss_mask.view(-1)).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model, return_schedule_plan=False):
    """Return the losses of a micro-batch, or the plan of their computation, and the function that adds them up."""
    batch = get_batch(data_iterator)
    forward = model.build_schedule_plan if return_schedule_plan else model
    # The attention mask is None: attention layers are causal by their spec, HGRN2 layers by construction.
    losses = forward(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return losses, functools.partial(loss_func, batch["loss_mask"])


def dataset_config(args) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )


def datasets_provider(num_samples, vp_stage=None):
    """Build the training, validation and test datasets on the first rank of each TP group."""
    args = get_args()
    dataset = MockGPTDataset if args.mock_data else GPTDataset

    def first_of_tp():
        return mpu.get_tensor_model_parallel_rank() == 0

    return BlendedMegatronDatasetBuilder(dataset, num_samples, first_of_tp, dataset_config(args)).build()


def use_prebuilt_dataset_helpers():
    """Make Megatron use the C++ dataset helpers that its wheel ships.

    The wheel has no Makefile, so without this call `pretrain` would run make, fail and exit.
    """
    folder = os.path.dirname(dataset_utils.__file__)
    if not os.path.exists(os.path.join(folder, "Makefile")):
        import megatron.core.datasets.helpers_cpp  # noqa: F401

        dataset_utils.compile_helpers = lambda: None


def build_gpt(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """Build a pipeline stage's chunk of the GPT that Megatron's args describe, for megatron-core 0.18."""
    args = get_args()
    if args.spec is None:
        raise ValueError(
            "--spec is missing, and this script needs it with megatron-core 0.18: give --spec hgrn2, install "
            "megatron-core 0.19, or run Megatron-LM's own pretrain_gpt.py"
        )
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=import_module(args.spec),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def main(model_config=gpt_config_from_args):
    """Train the model whose config `model_config` makes from Megatron's args. None builds a GPT by build_gpt."""
    use_prebuilt_dataset_helpers()
    datasets_provider.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    for name in NOT_HERE:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is not supported here: run Megatron-LM's own script through the launcher")
    if args.cuda_graph_impl == "full_iteration" and args.tensor_model_parallel_size > 1:
        # broadcast_data copies sizes to the host, which a CUDA graph cannot capture
        raise ValueError(
            "--cuda-graph-impl full_iteration with --tensor-model-parallel-size above 1 is not supported here: give "
            "--cuda-graph-impl local, or run Megatron-LM's own script through the launcher"
        )
    if model_config is None:
        config = pretrain_cfg_container_from_args(args)
        pretrain(config, datasets_provider, build_gpt, ModelType.encoder_or_decoder, forward_step)
    else:
        config = pretrain_cfg_container_from_args(args, model_config(args))
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
