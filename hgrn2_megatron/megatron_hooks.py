"""Patches of Megatron for HGRN2 models. The docstring of each function says what it wraps, and why at that place.

Other files have the patches of GPTModel and HybridModel (model_hooks.py), for checkpoints (checkpoint_hooks.py), for
Megatron-FSDP (fsdp.py), for offloading (offloading.py), for the loss by chunks (chunked_loss.py) and for a machine
without CUDA (cpu.py). All of them check their targets with patching.py.
"""

import argparse
import inspect
import sys

from hgrn2_megatron import arguments, checkpoint_hooks, cuda_graphs, requirements
from hgrn2_megatron.config import HGRN2Config, UsageError
from hgrn2_megatron.patching import wrap
from hgrn2_megatron.settings import Settings, global_args


def install_layers(placeholder: type, stack_spec) -> None:
    """Wrap TransformerBlock._build_layers, the one place that knows the layers of a stack before they are built.

    A spec cannot do this. Megatron reads only `.submodules` of a spec, and never instantiates a subclass of
    TransformerBlock. A layer cannot do it either, because it cannot see its stack. The lower bounds must belong to the
    stack, because a parameter inside a layer would be saved once per layer, and freed with that layer.

    This also wraps _get_block_submodules, where Megatron still has the spec, to find out whether the model is an HGRN2
    model. A pipeline stage without layers must have the lower bounds too.

    Args:
        placeholder: class that stands for the layers of an HGRN2 model in a spec.
        stack_spec: spec of a HybridModel. A TransformerBlock with this spec gets an error.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.transformer_block import TransformerBlock

    def make_submodules(get_block_submodules):
        def _get_block_submodules(config, spec, *rest, **kwargs):
            if spec is stack_spec:
                raise UsageError(
                    "--spec hgrn2_megatron.spec hgrn2_stack is for HybridModel (pretrain_hybrid.py), and this model is "
                    "a GPT: give a GPT --spec hgrn2_megatron.spec hgrn2"
                )
            submodules = get_block_submodules(config, spec, *rest, **kwargs)
            submodules.is_hgrn2 = getattr(spec, "module", None) is placeholder
            return submodules

        return _get_block_submodules

    def make(build_layers):
        def _build_layers(self):
            if not self.submodules.is_hgrn2:
                return build_layers(self)
            from hgrn2_megatron import offloading
            from hgrn2_megatron.block import share_bounds

            _prepare_stack(self)
            build_layers(self)
            share_bounds(self, [layer.layer_number - 1 for layer in self.layers])
            offloading.check_layers(self)

        return _build_layers

    wrap(transformer_block, "_get_block_submodules", ["config", "spec"], make_submodules)
    wrap(TransformerBlock, "_build_layers", ["self"], make)


def _prepare_stack(stack) -> None:
    """Check the configuration, resolve the layer specs and create the lower bounds before any layer is built."""
    from megatron.core.utils import get_pg_rank

    from hgrn2_megatron.block import banner, create_bounds
    from hgrn2_megatron.layer import transformer_block_submodules

    config, hgrn2 = stack.config, HGRN2Config.of(stack.config)
    warnings = requirements.check(Settings(config, global_args()))
    # A pattern may mix layers, so every layer is saved under a name of its own.
    config.hetereogenous_dist_checkpoint = True
    cuda_graphs.settle(config)
    stack.submodules = transformer_block_submodules(config, stack.vp_stage, get_pg_rank(stack.pg_collection.pp))
    stack.hgrn2_bounds = create_bounds(stack, hgrn2, config.num_layers)
    if stack.pre_process:
        banner(config, hgrn2, config.num_layers, warnings)


def install_generation() -> None:
    """Wrap MambaInferenceStateConfig and DynamicInferenceContext, which describe a model's states for generation.

    Megatron would read the shape of the states from Mamba layers and give them the model's dtype. It would notice only
    in the first step that flash-attn is missing.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.inference.config import MambaInferenceStateConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.utils import get_attr_wrapped_model

    def make_states(from_model):
        def wrapped(model, conv_states_dtype=None, ssm_states_dtype=None):
            decoder = get_attr_wrapped_model(model, "decoder")
            if not hasattr(decoder, "hgrn2_bounds"):
                return from_model(model, conv_states_dtype, ssm_states_dtype)
            from hgrn2_megatron.generation import HGRN2StateConfig

            return HGRN2StateConfig.of_stack(decoder, ssm_states_dtype)

        return wrapped

    def make_context(init):
        def __init__(self, model_config, inference_config, *rest, **kwargs):
            from hgrn2_megatron.generation import HGRN2StateConfig

            if isinstance(states := inference_config.mamba_inference_state_config, HGRN2StateConfig):
                states.check(inference_config)
            init(self, model_config, inference_config, *rest, **kwargs)

        return __init__

    wrap(MambaInferenceStateConfig, "from_model", ["model", "conv_states_dtype", "ssm_states_dtype"], make_states)
    wrap(DynamicInferenceContext, "__init__", ["self", "model_config", "inference_config"], make_context)


def install_graphs() -> None:
    """Wrap StaticBufferLoader, which feeds CUDA graphs of the full iteration, so that it returns copies of its dicts.

    It returns the dicts of its own buffers, and Megatron's scripts write into them. If a script drops a tensor from a
    batch, or cuts it under context parallelism, the buffer that the graph reads would be lost. The next batch would not
    reach the graph.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.full_cuda_graph import StaticBufferLoader

    def make_call(call):
        return lambda self, inputs, stage, microbatch: dict(call(self, inputs, stage, microbatch))

    wrap(StaticBufferLoader, "__call__", ["self", "inputs", "stage", "microbatch"], make_call)


def extra_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags to Megatron's parser, and install the patches for training if this is an HGRN2 run.

    This is the entry point in the group megatron.extra_args, for runs without the launcher. Runs of other models get
    only the flags.

    Args:
        parser: Megatron's parser.

    Returns:
        The same parser.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    is_hgrn2 = arguments.is_hgrn2_spec(arguments.spec_of(sys.argv[1:]))
    # The spec may come from the checkpoint.
    if is_hgrn2 or "--use-checkpoint-args" in sys.argv:
        install_training()
    return _set_defaults(arguments.add_arguments(parser), arguments.silent_defaults() if is_hgrn2 else {})


def _set_defaults(parser: argparse.ArgumentParser, defaults: dict) -> argparse.ArgumentParser:
    missing = sorted(set(defaults) - {action.dest for action in parser._actions})
    if missing:
        raise RuntimeError(
            f"hgrn2_megatron does not know this Megatron release: its parser has no flags for {missing}. Install a "
            "release that README.md names"
        )
    parser.set_defaults(**defaults)
    return parser


def install_arguments(defaults: dict) -> None:
    """Wrap the parser of megatron.training, so that it has the plugin's flags, and install the patches for training.

    Scripts pass their own extra_args_provider to `pretrain`. The only place left for a plugin's flags is the function
    that adds Megatron's own.

    Args:
        defaults: attribute -> default value in the parser.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    import megatron.training.arguments as megatron_arguments

    def make_parser(add_megatron_arguments):
        return lambda parser: _set_defaults(extra_args(add_megatron_arguments(parser)), defaults)

    wrap(megatron_arguments, "add_megatron_arguments", ["parser"], make_parser)
    install_training()


def install_training() -> None:
    """Wrap the validation of args, the config builder, the checkpoints and the reports of megatron.training.

    The plugin checks flags in the validation, because there they are final, including those from a checkpoint.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    import megatron.training.argument_utils as argument_utils
    import megatron.training.arguments as megatron_arguments
    from megatron.core.transformer import TransformerConfig

    def make_validation(validate_args):
        def wrapped(args, *rest, **kwargs):
            args.spec = arguments.full_spec(args.spec)
            if arguments.is_hgrn2_spec(args.spec):
                arguments.fill_silent(args)
                requirements.check(Settings(args), stack=arguments.is_stack_spec(args.spec))
            else:
                warnings = requirements.check_without_spec(args)
                # the ranks are not connected yet
                for warning in warnings if args.rank == 0 else ():
                    print(f"HGRN2 warning: {warning}", flush=True)
            return validate_args(args, *rest, **kwargs)

        return wrapped

    def make_config(core_transformer_config_from_args):
        def wrapped(args, config_class=None):
            if not arguments.is_hgrn2_spec(args.spec):
                return core_transformer_config_from_args(args, config_class)
            # Megatron's model builders may pass Megatron's own class.
            if config_class in (None, TransformerConfig):
                config_class = arguments.HGRN2TransformerConfig
            return arguments.with_settings(core_transformer_config_from_args(args, config_class), args)

        return wrapped

    wrap(megatron_arguments, "validate_args", ["args"], make_validation)
    wrap(argument_utils, "core_transformer_config_from_args", ["args", "config_class"], make_config)
    checkpoint_hooks.install_checkpoint()
    install_reports()


def install_reports() -> None:
    """Wrap Megatron's reports of floating-point operations and memory, which would count HGRN2 layers as attention.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    import megatron.training.theoretical_memory_usage as memory
    import megatron.training.training as training

    from hgrn2_megatron.flops import model_flops

    def make_count(num_floating_point_operations):
        signature = inspect.signature(num_floating_point_operations)

        def wrapped(args, batch_size, *rest, **kwargs):
            if not arguments.is_hgrn2_spec(args.spec):
                return num_floating_point_operations(args, batch_size, *rest, **kwargs)
            given = signature.bind(args, batch_size, *rest, **kwargs).arguments
            tokens = given.get("total_real_tokens_in_batch")
            tokens = batch_size * args.seq_length if tokens is None else tokens
            return model_flops(
                args, tokens, lambda others: num_floating_point_operations(others, batch_size, *rest, **kwargs)
            )

        return wrapped

    def make_memory(report_theoretical_memory):
        def wrapped(args, *rest, **kwargs):
            if not arguments.is_hgrn2_spec(args.spec):
                return report_theoretical_memory(args, *rest, **kwargs)
            print("Theoretical memory footprints are not known for models with HGRN2 layers.")
            return None

        return wrapped

    wrap(training, "num_floating_point_operations", ["args", "batch_size"], make_count)
    wrap(memory, "report_theoretical_memory", ["args"], make_memory)
