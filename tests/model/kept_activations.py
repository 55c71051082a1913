"""On a GPU, what the mixer's norm makes between forward and backward: prints what was compared, and fails otherwise.

kept_activations.py SETTINGS

SETTINGS is what `harness.build_model` takes, as JSON, or "bf16": true.
"""

import json
import sys

import harness
import torch

BATCH = 8


def main(settings: dict):
    harness.start_megatron(cpu_mode=True)
    from hgrn2_megatron import mixer

    dtype = torch.bfloat16 if settings.get("bf16") else torch.float32
    model = harness.build_model(**settings, params_dtype=dtype).to("cuda", dtype)
    mixers = [module for module in model.modules() if isinstance(module, mixer.HGRN2Mixer)]
    tokens = harness.batch(size=BATCH)[0].to("cuda")
    positions = torch.arange(harness.SEQ, device="cuda").expand_as(tokens)

    def run(between=lambda: None):
        """Bytes between forward and backward, and the gradients."""
        for p in model.parameters():
            p.grad = None
        loss = model(tokens, positions, None).float().square().mean()
        memory = torch.cuda.memory_allocated()
        between()
        loss.backward()
        # on the host, where they are not counted
        return memory, {name: p.grad.cpu() for name, p in model.named_parameters()}

    # kernels are tuned and buffers made
    run()
    memory, gradients = run()

    forms = (lambda x: x, lambda x: x.detach(), lambda x: x[0], lambda x: x.detach()[1:].flatten())
    kept, copies = [], []

    def take(x):
        for form in forms:
            kept.append(form(x))
            copies.append(form(x.detach()).clone())

    def assert_as_they_were():
        torch.cuda.synchronize()
        assert all(torch.equal(x, copy) for x, copy in zip(kept, copies, strict=True))

    hooks = [each.norm.register_forward_hook(lambda module, args, y: take(y)) for each in mixers]
    hooks += [each.out_proj.register_forward_pre_hook(lambda module, args: take(args[0])) for each in mixers]
    _, held = run(assert_as_they_were)
    assert len(kept) == 2 * len(forms) * len(mixers)
    assert_as_they_were()
    for hook in hooks:
        hook.remove()
    kept.clear()
    copies.clear()

    mixer.recompute_in_backward = lambda x, user: None
    run()
    whole_memory, want = run()
    freed, expected = whole_memory - memory, len(mixers) * tokens.numel() * model.config.hidden_size * dtype.itemsize
    assert freed >= expected, f"{freed} bytes are freed, {expected} expected"
    for found in (gradients, held):
        harness.assert_all_close(found, want, tolerance=1e-6 if dtype == torch.float32 else 1e-3)
    print(f"{freed} bytes freed, {len(want)} gradients equal")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
