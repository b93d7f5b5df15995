"""``CUSPARGE_COMPILE``: when kernels are compiled."""

from __future__ import annotations

import os

from cusparge.errors import InvalidArgumentError, shown

__all__ = ["MODES", "VARIABLE", "mode"]

VARIABLE = "CUSPARGE_COMPILE"

#: What each value means, as messages tell it.
MODES = {
    "background": "while the program goes on after the import",
    "import": "before the import returns",
    "lazy": "at first use",
    "off": "never: the cache or a seed must hold them",
}


def mode() -> str:
    """Return the mode that the environment asks for; an InvalidArgumentError for no mode."""
    text = os.environ.get(VARIABLE, "").strip().lower() or "background"
    if text not in MODES:
        allowed = ", ".join(f"{name} ({meaning})" for name, meaning in MODES.items())
        raise InvalidArgumentError(
            f"{VARIABLE}={shown(text)} says when kernels are compiled, and is none of what is "
            f"allowed: {allowed}. Unset it for background."
        )
    return text
