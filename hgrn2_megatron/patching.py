"""Patches of Megatron and PyTorch that check the signature of their target first and keep the original."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

_ORIGINAL = "_hgrn2_original"
_PACKAGES = {"megatron": "Megatron", "torch": "PyTorch"}


def unknown_release(owner: Any, problem: str) -> RuntimeError:
    """Return the error for a target that is not as expected.

    Args:
        owner: module or class of the target.
        problem: name of the target, what was found, and what was expected.
    """
    module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    package = _PACKAGES.get(module.split(".")[0], "Python")
    return RuntimeError(
        f"hgrn2_megatron does not know this {package} release: {problem}. Install a release that README.md names"
    )


def check_target(owner: Any, name: str, parameters: list[str]) -> Any:
    """Return `owner.name` if its first parameters have the expected names.

    Args:
        owner: module or class of the target.
        name: name of the target.
        parameters: names that the target's parameters must begin with.

    Raises:
        RuntimeError: the target is missing, has no signature, or takes other parameters.
    """
    target: Any = getattr(owner, name, None)
    try:
        found = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        problem = f"{owner.__name__}.{name} is missing or has no signature, expected parameters {parameters}"
        raise unknown_release(owner, problem) from None
    if found[: len(parameters)] != parameters:
        raise unknown_release(owner, f"{owner.__name__}.{name} has parameters {found}, expected {parameters}")
    return target


def wrap(owner: Any, name: str, parameters: list[str], make: Callable) -> None:
    """Replace the function or class `owner.name` once, in every loaded module that has it under this name.

    The replacement keeps the original as `_hgrn2_original`.

    Args:
        owner: module or class of the target.
        name: name of the target.
        parameters: names that the target's parameters must begin with.
        make: function that takes the original and returns its replacement.

    Raises:
        RuntimeError: the target is missing, has no signature, or takes other parameters.
    """
    if hasattr(getattr(owner, name, None), _ORIGINAL):
        return
    original = check_target(owner, name, parameters)
    replacement = make(original)
    if not inspect.isclass(replacement):
        functools.update_wrapper(replacement, original)
    setattr(replacement, _ORIGINAL, original)
    # A plain function would get the instance as its first argument, and a static original does not take it.
    static = isinstance(inspect.getattr_static(owner, name), staticmethod | classmethod)
    setattr(owner, name, staticmethod(replacement) if static else replacement)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def change_class(instance: Any, cls: type, name: str, parameters: list[str]) -> None:
    """Change the class of an object to a subclass `cls` that overrides the method `name`.

    The object keeps its attributes, and gets its former class as `_hgrn2_original`.

    Args:
        instance: object whose class is exactly the base class of `cls`.
        cls: subclass with one base class.
        name: method of the base class that `cls` overrides.
        parameters: names that the parameters of the base class's method must begin with.

    Raises:
        TypeError: the object has another class.
        RuntimeError: the base class's method is missing or takes other parameters.
    """
    base = type(instance)
    if cls.__bases__ != (base,):
        raise TypeError(f"{cls.__name__} derives from {cls.__bases__}, and the object to change has the class {base}")
    check_target(base, name, parameters)
    instance.__class__ = cls
    setattr(instance, _ORIGINAL, base)
