"""Run lm-evaluation-harness on a Megatron checkpoint, without converting it.

    torchrun --nproc_per_node 1 -m hgrn2_megatron examples/evaluate.py --load <checkpoint> --use-checkpoint-args \\
        -- --tasks my_task --include_path my_tasks --batch_size 16

Flags before `--` go to Megatron, flags after it go to `lm_eval run`. Its --model_args may set max_length and the other
options of lm_eval's `hf` model, except the weights. The script needs `pip install 'lm-eval[hf]'`. It also needs the
tokenizer that `convert` would export: the folder `tokenizer` of the checkpoint, or the run's --tokenizer-model. Tensor
parallelism works. Tasks that generate text are refused.
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


def forward(megatron: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [B, T, padded vocabulary] of tokens [B, T] int64, on every rank. Call it on all ranks."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return megatron(tokens, positions, None, runtime_gather_output=True)


class Model(PreTrainedModel):
    """A model of Megatron with the interface of a transformers model, on rank 0. The other ranks call `follow`.

    Args:
        megatron: a GPTModel or HybridModel, which returns logits [B, T, padded vocabulary].
        vocab_size: size of the vocabulary without Megatron's padding. The logits of the padding are cut off.
        max_length: largest number of tokens of a sequence. Longer sequences are cut into windows.
    """

    config_class = PretrainedConfig

    def __init__(self, megatron: torch.nn.Module, vocab_size: int, max_length: int):
        settings = {"vocab_size": vocab_size, "max_position_embeddings": max_length}
        super().__init__(PretrainedConfig.from_dict(settings))
        self.megatron = megatron
        self.post_init()

    def _init_weights(self, module: torch.nn.Module):
        """Do nothing: the weights come from Megatron's checkpoint."""

    @torch.inference_mode()
    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        """Return logits [B, T, vocabulary] of input_ids [B, T] int64."""
        torch.distributed.broadcast_object_list([input_ids.cpu()])
        logits = forward(self.megatron, input_ids)
        return CausalLMOutput(logits=logits[..., : self.config.vocab_size])


@torch.inference_mode()
def follow(megatron: torch.nn.Module):
    """Compute this rank's part of every forward pass of rank 0, until rank 0 sends None."""
    while True:
        box = [None]
        torch.distributed.broadcast_object_list(box)
        if box[0] is None:
            return
        forward(megatron, box[0].cuda())


def lm_eval_class(model: Model, tokenizer: Path):
    """Return the class with which lm-evaluation-harness evaluates `model`.

    It is a subclass of the harness's Hugging Face model, so tokens, windows and sums are the harness's own.
    """
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
            raise NotImplementedError("tasks that generate text do not run here: convert the checkpoint for them")

    return MegatronLM


def read_command_line() -> tuple[Path, list[str]]:
    """Set Megatron's args from the checkpoint and from the flags before `--`.

    Returns:
        The folder of the tokenizer, and the flags after `--`.

    Raises:
        ValueError: a flag is missing or is not supported. The message names the flag to give or to drop.
    """
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, lm_eval_flags = sys.argv[:split], sys.argv[split + 1 :]
    given = parse_args()
    if given.load is None:
        raise ValueError("--load is missing: give the folder that --save named in training")
    saved = read_args(checkpoint_folder(Path(given.load)))
    tokenizer = tokenizer_folder(Path(given.load), given) or tokenizer_folder(Path(given.load), saved)
    if tokenizer is None:
        raise ValueError(
            f"no tokenizer found: put a Hugging Face tokenizer into {given.load}/tokenizer "
            "(examples/byte_tokenizer.py writes one for bytes)"
        )
    # Megatron's own tokenizer is used only for the size of the vocabulary
    sys.argv.append("--no-use-tokenizer-model-from-checkpoint-args")
    vocab_size = given.vocab_size or getattr(saved, "vocab_size", None) or saved.padded_vocab_size
    args = parse_and_validate_args(args_defaults=DEFAULTS | {"vocab_size": vocab_size})
    if args.world_size != args.tensor_model_parallel_size or args.sequence_parallel:
        raise ValueError(
            f"evaluate.py supports no parallelism except tensor parallelism, and found {args.world_size} processes for "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: make the two numbers equal, and drop "
            "--sequence-parallel"
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
        megatron = load_model()
    if torch.distributed.get_rank():
        follow(megatron)
    else:
        args = get_args()
        model = Model(megatron, args.vocab_size, args.max_position_embeddings or args.seq_length)
        register_model("megatron")(lm_eval_class(model, tokenizer))
        sys.argv = ["lm_eval", "run", "--model", "megatron", *lm_eval_flags]
        cli_evaluate()
        torch.distributed.broadcast_object_list([None])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
