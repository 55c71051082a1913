"""HybridModels with multi-latent attention through the launcher."""

from training import STACK, assert_continues, train

WIDTHS = "--q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type rope"
LATENT = (*STACK, "--hybrid-layer-pattern", "M-+-", *WIDTHS.split())


def test_multi_latent_attention_trains_and_resumes(tmp_path):
    run = dict(script="examples/pretrain_hybrid.py")
    losses, output = train(*LATENT, "--save", tmp_path, "--save-interval", 4, **run)
    assert "HGRN2: 1 of 2 layers, expand 32, lower bounds learned" in output
    assert "HGRN2 warning" not in output and "decoder.layers.2.self_attention.linear_kv_up_proj.weight" in output
    assert float(losses[8]) < float(losses[1]) - 0.3
    resumed, _ = train(*LATENT, "--load", tmp_path, "--ckpt-step", 4, **run)
    assert_continues(resumed, losses)
