"""The exceptions that cusparge raises.

Every message says what was wrong, what was received, what is allowed and how to mend it.
"""

__all__ = [
    "CompileError",
    "CuspargeError",
    "DeviceError",
    "InvalidArgumentError",
    "UnsupportedError",
]


class CuspargeError(Exception):
    """Base of everything that cusparge raises on purpose."""


class InvalidArgumentError(CuspargeError, ValueError):
    """An argument is wrong: its type, shape, dtype, device, framework or value."""


class UnsupportedError(CuspargeError, NotImplementedError):
    """The request makes sense, but the library does not do it."""


class DeviceError(CuspargeError, RuntimeError):
    """A device is missing, or it cannot be used."""


class CompileError(CuspargeError, RuntimeError):
    """A CUDA kernel could not be compiled or loaded."""
