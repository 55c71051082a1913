"""lm-evaluation-harness on a Megatron checkpoint as it is, without converting it.

    torchrun --nproc_per_node 1 -m hgrn2_megatron examples/evaluate.py --load <checkpoint> --use-checkpoint-args \\
        -- --tasks my_task --include_path my_tasks --batch_size 16

What comes before `--` is Megatron's, what comes after it that of `lm_eval run`, whose --model_args may name
max_length and what else its `hf` model takes beside the weights. Needs `pip install 'lm-eval[hf]'`, and the tokenizer
that `convert` takes along: the checkpoint's folder `tokenizer`, or the run's --tokenizer-model. Tensor parallelism
will do; tasks that generate text are not served.
"""

import sys
from pathlib import Path

import torch
from generate import DEFAULTS, load_model, stdout_for_the_result
from megatron.training import get_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.initialize import initialize_megatron
from pretrain_gpt import use_prebuilt_dataset_helpers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hgrn2_megatron.conversion.command import tokenizer_folder
from hgrn2_megatron.conversion.files import checkpoint_folder, read_args


def forward(gpt: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, padded vocabulary] of tokens [B, T] int64, on every rank; call it on all of them."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return gpt(tokens, positions, None, runtime_gather_output=True)


class Model(PreTrainedModel):
    """A Megatron GPT as transformers would have it, on rank 0; the other ranks `follow` it.

    Args:
        gpt: gives logits [B, T, padded vocabulary].
        vocab_size: without Megatron's padding, whose logits are cut off.
        max_length: tokens of a sequence at most; longer ones are cut into windows.
    """

    config_class = PretrainedConfig

    def __init__(self, gpt: torch.nn.Module, vocab_size: int, max_length: int):
        settings = {"vocab_size": vocab_size, "max_position_embeddings": max_length}
        super().__init__(PretrainedConfig.from_dict(settings))
        self.gpt = gpt
        self.post_init()

    def _init_weights(self, module: torch.nn.Module):
        """They are Megatron's."""

    @torch.inference_mode()
    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Logits [B, T, vocabulary] of input_ids [B, T] int64."""
        torch.distributed.broadcast_object_list([input_ids.cpu()])
        logits = forward(self.gpt, input_ids)
        return CausalLMOutput(logits=logits[..., : self.config.vocab_size])


@torch.inference_mode()
def follow(gpt: torch.nn.Module):
    """Compute this rank's part of what rank 0 computes, until it is done."""
    while True:
        box = [None]
        torch.distributed.broadcast_object_list(box)
        if box[0] is None:
            return
        forward(gpt, box[0].cuda())


def lm_eval_class(model: Model, tokenizer: Path):
    """lm-evaluation-harness's model of Hugging Face around `model`: its own tokenizing, windows and sums."""
    from lm_eval.models.huggingface import HFLM

    class MegatronLM(HFLM):
        def __init__(self, batch_size=1, max_batch_size=64, device=None, **options):
            super().__init__(
                model,
                backend="causal",
                tokenizer=AutoTokenizer.from_pretrained(tokenizer),
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **options,
            )

        def generate_until(self, requests, disable_tqdm=False):
            raise NotImplementedError("tasks that generate text are not served here: convert the checkpoint for them")

    return MegatronLM


def read_command_line() -> tuple[Path, list[str]]:
    """Set Megatron's args, of the checkpoint and of what comes before `--`.

    Returns:
        The folder of the tokenizer, and what comes after `--`.

    Raises:
        ValueError: it names the flag to give or to drop.
    """
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, lm_eval_flags = sys.argv[:split], sys.argv[split + 1 :]
    given = parse_args()
    if given.load is None:
        raise ValueError("give --load, the folder that --save named in training")
    saved = read_args(checkpoint_folder(Path(given.load)))
    tokenizer = tokenizer_folder(Path(given.load), given) or tokenizer_folder(Path(given.load), saved)
    if tokenizer is None:
        raise ValueError(
            f"no tokenizer: put a Hugging Face one into {given.load}/tokenizer (of bytes: examples/byte_tokenizer.py)"
        )
    # Megatron's own tokenizer only counts tokens here
    sys.argv.append("--no-use-tokenizer-model-from-checkpoint-args")
    vocab_size = given.vocab_size or getattr(saved, "vocab_size", None) or saved.padded_vocab_size
    args = parse_and_validate_args(args_defaults=DEFAULTS | {"vocab_size": vocab_size})
    if args.world_size != args.tensor_model_parallel_size or args.sequence_parallel:
        raise ValueError(
            f"evaluation knows tensor parallelism only: start {args.tensor_model_parallel_size} processes, "
            "or give --tensor-model-parallel-size, and drop --sequence-parallel"
        )
    return tokenizer, lm_eval_flags


def main():
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ImportError as error:
        sys.exit(f"lm-evaluation-harness is missing: pip install 'lm-eval[hf]' ({error})")
    with stdout_for_the_result():
        use_prebuilt_dataset_helpers()
        tokenizer, lm_eval_flags = read_command_line()
        initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
        gpt = load_model()
    if torch.distributed.get_rank():
        follow(gpt)
    else:
        args = get_args()
        model = Model(gpt, args.vocab_size, args.max_position_embeddings or args.seq_length)
        register_model("megatron")(lm_eval_class(model, tokenizer))
        sys.argv = ["lm_eval", "run", "--model", "megatron", *lm_eval_flags]
        cli_evaluate()
        torch.distributed.broadcast_object_list([None])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
