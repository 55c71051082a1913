"""examples/pretrain_gpt.py that is killed in the middle of a save: KILL_ITERATION's, after some of its tensors.

A script for the launcher, not a test.
"""

import functools
import os
import runpy
import signal

from megatron.core.dist_checkpointing.strategies import filesystem_async

WRITTEN = 20
write_item = filesystem_async._write_item
written = []


@functools.wraps(write_item)
def write_some(transforms, stream, *args, **kwargs):
    result = write_item(transforms, stream, *args, **kwargs)
    if f"iter_{int(os.environ['KILL_ITERATION']):07d}" in stream.name:
        written.append(result)
    if len(written) >= WRITTEN:
        stream.flush()
        # with its helpers at once: PyTorch raises an error in a process that hears of the death of a loader of data,
        # and a helper that lives on keeps the output open
        os.killpg(os.getpgrp(), signal.SIGKILL)
    return result


if os.getpgrp() != os.getpid():
    # torchrun's, which is to go on
    os.setpgrp()
filesystem_async._write_item = write_some
runpy.run_path(os.path.join("examples", "pretrain_gpt.py"), run_name="__main__")
