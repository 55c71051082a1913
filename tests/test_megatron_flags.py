"""The table of Megatron's flags of attention, Mamba and layers: it is whole, what it says is so, and the docs say it.

It runs against any release: `PYTHONPATH=<Megatron-LM> pytest tests/test_megatron_flags.py` walks a checkout's parser.
"""

import argparse
import re

import harness
import pytest
import torch
from model_settings import gpt_settings, stack_settings
from training import HGRN2, train

from hgrn2_megatron import UsageError, requirements
from hgrn2_megatron.megatron_flags import TABLE, Effect, command_line
from hgrn2_megatron.requirements import check

ROWS = {name: row for row in TABLE for name in row.names}
# what Megatron's parser calls the groups of such flags, and words of those that it has in other groups
GROUPS = (
    "transformer configuration",
    "network size",
    "mla",
    "experimental_attention_variant",
    "heterogeneous architecture",
)
WORDS = re.compile(
    r"attention|attn|qk|query_groups|kv_channels|rope|rotary|yarn|mscale|window_|softmax|mamba|ssm|gdn|gdp|dsa|mla|"
    r"linear_|lora|layer_freq|_layers|heterogeneous|hybrid|mhc|mtp|position_(emb|ids)|yaml_cfg|^spec$"
)
# flags of the groups, or with the words, that are of other things
OTHERS = re.compile(
    # parallel layouts, communication, memory and speed
    r"(tensor|pipeline|context|expert|sequence)_(model_|tensor_)?parallel|tp_comm|overlap_|use_ring|delay_|defer_|wgrad_|"
    r"microbatch|cpu_offload|recompute_|distribute_saved|offload|fine_grained|min_offload|delta_offload|activation_offload|"
    r"cuda_graph|enable_cuda_graph|external_cuda_graph|inference_|moe_|high_priority|account_for|clone_scatter|"
    r"max_seqlen_per|hybrid_context_parallel|symmetric_ar|nccl_all|batch_invariant|deterministic|config_logger|"
    r"mlp_chunks|ep_overlap|gtp_|"
    # precision
    r"fp16|bf16|fp8|fp4|disable_bf16|first_last_layers|num_layers_at_|fp32_residual|"
    # the block around the mixer, which requirements.py checks, and the channel mixer
    r"hidden_|ffn_|layernorm_|add_bias|normalization|apply_residual|fused_residual|glu_|activation_func|use_te_|use_fused|"
    r"use_transformer_engine|use_grouped_gemm|swiglu|squared_relu|quick_geglu|openai_gelu|transformer_impl|cross_entropy|"
    r"init_method|init_model|embedding_init|perform_init|use_cpu_init|use_mup|mup_(width|base_hidden|embedding|output)|"
    r"calculate_per|make_vocab|untie|onnx|bert_|dino|no_persist|"
    # data, reinforcement learning and the optimizer
    r"rl_|loss_scale_window|use_layer_wise|biencoder"
)
# of later releases than the oldest
NEW_IN_19 = (
    "flash_attention_version mtp_detach_heads yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow "
    "yarn_correction_range_round_to_int dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_kernel_backend "
    "dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon "
    "dsa_indexer_k_norm_fp32 mamba_training_ssm_states_dtype freeze_all_layers"
).split()
NEW_IN_20 = (
    "mtp_hsm enable_mhc_connections mhc_num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor "
    "mhc_recompute_layer_num gdp_num_householder gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute"
).split()


def groups() -> dict[str, str]:
    """Group of each attribute of Megatron's real parser."""
    import megatron.training.arguments

    parser = megatron.training.arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {action.dest: group.title for group in parser._action_groups for action in group._group_actions}


@pytest.mark.releases
def test_every_flag_of_these_groups_has_a_row():
    found = {name for name, group in groups().items() if group in GROUPS or WORDS.search(name)}
    assert len(found) > 200
    assert sorted(name for name in found - ROWS.keys() if not OTHERS.match(name)) == []


@pytest.mark.releases
def test_every_row_is_of_a_flag():
    assert len(ROWS) == sum(len(row.names) for row in TABLE)
    assert ROWS.keys() - groups().keys() <= {*NEW_IN_19, *NEW_IN_20}


def test_the_docs_have_the_same_table():
    docs = (harness.ROOT / "docs" / "reference" / "flags.md").read_text()
    flags = command_line()

    def flag(name):
        return flags[name].option_strings[0] if name in flags else f"--{name.replace('_', '-')}"

    for row in TABLE:
        line = f"| {', '.join(f'`{flag(name)}`' for name in row.names)} | {row.effect.value} | {row.what} |"
        assert docs.count(line) == 1, line


REFUSED = [name for row in TABLE if row.effect is Effect.REFUSED for name in row.names if name != "yaml_cfg"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_calls_refused_is(name):
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        check(gpt_settings(**{name: 1}))


# pure and hybrid, as a GPT and as a HybridModel
FORMS = (
    ({}, {"hgrn2_layer_pattern": "H*"}),
    ({"hybrid_layer_pattern": "M-M-"}, {"hybrid_layer_pattern": "M-*-"}),
)
# another value than the default of settings that Megatron's own attention takes (windows need the CPU mode: below)
OTHER_VALUES = {
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "attention_output_gate": True,
    "softmax_type": "off-by-one",
    "kv_channels": 8,
    "num_query_groups": 2,
    "no_rope_freq": 1,
    "rotary_interleaved": True,
    "position_embedding_type": "none",
}


@pytest.fixture(scope="module")
def logits():
    harness.start_megatron()
    tokens, _ = harness.batch()
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)

    def of(**settings):
        torch.manual_seed(0)
        model = harness.build_model(num_layers=2, **settings)
        with torch.no_grad():
            return model(tokens, positions, mask)

    return of


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_attention_layers_take_their_flags_and_hgrn2_layers_do_not(name, logits):
    """In both forms; the table calls it ATTENTION."""
    assert ROWS[name].effect is Effect.ATTENTION
    # positions have another default in a pure model
    rope = {"position_embedding_type": "rope"}
    change = rope | {name: OTHER_VALUES[name]}
    for pure, hybrid in FORMS:
        assert torch.equal(logits(**pure, **change), logits(**pure, **rope))
        assert not torch.equal(logits(**hybrid, **change), logits(**hybrid, **rope))


def warned(settings, stack: bool = False) -> list[str]:
    """Flags in the warning of a model that is built without a command line."""
    lines = [line for line in check(settings, stack=stack) if line.startswith("these flags have no effect")]
    assert len(lines) <= 1
    return re.findall(r"--[\w-]+", lines[0].split(";")[0]) if lines else []


def test_a_model_without_a_command_line_warns_of_what_it_is_given_alone(monkeypatch):
    monkeypatch.setattr(requirements, "global_args", lambda: None)
    given = gpt_settings(num_attention_heads=4, kv_channels=64, num_query_groups=4, attention_dropout=0.0)
    assert warned(given) == []
    given = dict(qk_layernorm=True, kv_channels=32, num_attention_heads=4, mamba_state_dim=64)
    assert warned(gpt_settings(**given)) == ["--kv-channels", "--qk-layernorm", "--mamba-state-dim"]
    assert warned(gpt_settings(**given, hgrn2_layer_pattern="H*")) == ["--mamba-state-dim"]
    assert warned(stack_settings(**given), stack=True) == ["--mamba-state-dim"]
    assert warned(stack_settings(**given, hybrid_layer_pattern="M-"), stack=True) == warned(gpt_settings(**given))


@pytest.mark.parametrize("missing", ["num_attention_heads", "hidden_size"])
def test_a_size_that_is_missing_is_left_to_megatron(missing, monkeypatch):
    monkeypatch.setattr(requirements, "global_args", lambda: None)
    settings = gpt_settings(kv_channels=48, num_attention_heads=4)
    assert warned(settings) == ["--kv-channels"]
    object.__setattr__(settings, missing, None)
    assert warned(settings) == []


FLAGS = (
    "--qk-layernorm --window-size 8,0 --softmax-type off-by-one --attention-output-gate --kv-channels 16 "
    "--group-query-attention --num-query-groups 1 --use-rope-scaling --mamba-state-dim 64 --moe-layer-freq 2 "
    "--train-iters 2 --position-embedding-type rope"
).split()
NAMED = (
    "--group-query-attention --kv-channels --qk-layernorm --softmax-type --window-size "
    "--attention-output-gate --position-embedding-type --use-rope-scaling --mamba-state-dim --moe-layer-freq"
).split()
STACK = ("--spec", "hgrn2_stack", "--hybrid-layer-pattern")
MODELS = {
    "pure GPT": (HGRN2, "examples/pretrain_gpt.py", {"--moe-layer-freq"}),
    "hybrid GPT": (
        (*HGRN2, "--hgrn2-layer-pattern", "H*"),
        "examples/pretrain_gpt.py",
        {*NAMED} - {"--mamba-state-dim"},
    ),
    "pure HybridModel": ((*STACK, "M-M-"), "examples/pretrain_hybrid.py", set()),
    "HybridModel": (
        (*STACK, "M-*-"),
        "examples/pretrain_hybrid.py",
        {*NAMED} - {"--mamba-state-dim", "--moe-layer-freq", "--use-rope-scaling"},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_run_names_what_has_no_effect_in_one_line(model):
    spec, script, taken = MODELS[model]
    plain, output = train(*spec, "--train-iters", 2, script=script)
    assert "HGRN2 warning" not in output
    losses, output = train(*spec, *FLAGS, script=script)
    (line,) = re.findall(r"HGRN2 warning: these flags have no effect in this model: (.*); ", output)
    assert line.split(", ") == [flag for flag in NAMED if flag not in taken]
    assert (losses == plain) is model.startswith("pure")


@pytest.mark.parametrize(
    ("spec", "content", "refused"),
    [
        ("--spec hgrn2", "num_layers: 2", True),
        ("", "spec: [hgrn2_megatron.spec, hgrn2]", True),
        ("", "num_layers: 2", False),
    ],
)
def test_a_yaml_file_is_refused_where_it_would_lose_the_spec(spec, content, refused, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text(content)
    done = harness.python("-m", "hgrn2_megatron", "examples/pretrain_gpt.py", "--yaml-cfg", str(file), *spec.split())
    assert done.returncode != 0
    assert ("hgrn2_megatron: error: --yaml-cfg " in done.stdout) is refused, done.stdout[-2000:]
