"""Read the settings of a run from Megatron's args and config, and refuse settings by a table."""

import sys
from typing import Any

import megatron.core

from hgrn2_megatron.config import UsageError


class Settings:
    """View of several objects that hold settings, such as Megatron's args and its TransformerConfig.

    An attribute comes from the first object that has it. It is None if no object has it.
    """

    def __init__(self, *sources: Any):
        self._sources = [s for s in sources if s is not None]

    def __getattr__(self, name: str) -> Any:
        for source in self._sources:
            if hasattr(source, name):
                return getattr(source, name)
        return None


def megatron_release() -> tuple[int, int]:
    """Return the release of megatron-core as numbers: (0, 19) for 0.19.2."""
    major, minor = megatron.core.__version__.split(".")[:2]
    return int(major), int(minor)


def global_args():
    """Return Megatron's parsed command line, or None where only megatron.core is used."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    return getattr(global_vars, "_GLOBAL_ARGS", None)


def refuse(s: Settings, table: tuple, why: str):
    """Refuse the first feature of a table that the settings ask for.

    Args:
        s: settings of this run.
        table: rows of three: a function that returns whether the settings ask for the feature, its flag, and what to
            do instead.
        why: first part of the message, with `{}` in the place of the flag.

    Raises:
        UsageError: the settings ask for a feature of the table. The message names its flag and what to do instead.
    """
    for asked, flag, instead in table:
        if asked(s):
            raise UsageError(f"{why.format(flag)}: {instead}")
