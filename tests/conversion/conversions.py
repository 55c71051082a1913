"""Conversions in one process, each with its check, which switches the CPU mode on for good; not a test.

The one argument is a JSON list of [command line of `convert`, whether to write wrong weights]; the last line printed is
the JSON list of their exit statuses. Wrong weights are those of two matrices swapped in one layer.
"""

import dataclasses
import json
import sys

from hgrn2_megatron import __main__
from hgrn2_megatron.conversion import command as convert

QUERY, VALUE = (f"model.layers.2.attn.{name}_proj.weight" for name in "qi")
weights = convert.weights


def swapped(*args):
    """The table of weights with q and i of the last layer in each other's place."""
    other = {QUERY: VALUE, VALUE: QUERY}
    return [
        dataclasses.replace(w, parts={other.get(name, name): shape for name, shape in w.parts.items()})
        for w in weights(*args)
    ]


def status(command: list[str], wrong: bool) -> int:
    convert.weights = swapped if wrong else weights
    sys.argv = ["hgrn2_megatron", "convert", *command]
    try:
        __main__.main()
    except SystemExit as end:
        return end.code
    return 0


print(json.dumps([status(*case) for case in json.loads(sys.argv[1])]))
