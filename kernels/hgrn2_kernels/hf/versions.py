"""Check of the installed release of transformers, which runs when `hgrn2_kernels.hf` is imported."""

import importlib.metadata

OLDEST, BELOW = (5, 24), (6,)


def check(installed: str | None):
    """Check that a release of transformers is supported.

    Args:
        installed: version of the installed release, or None if there is none.

    Raises:
        ImportError: there is no transformers, or its release is not supported.
    """
    supported = f">={'.'.join(map(str, OLDEST))},<{BELOW[0]}"
    advice = f"hgrn2_kernels.hf needs transformers{supported}: pip install 'transformers{supported}'"
    if installed is None:
        raise ImportError(f"transformers is not installed. {advice}")
    if not OLDEST <= tuple(map(int, installed.split(".")[:2])) < BELOW:
        raise ImportError(f"transformers {installed} is installed. {advice}")


def installed() -> str | None:
    """Return the version of the installed transformers, or None if there is none."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


check(installed())
