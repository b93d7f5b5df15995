"""Arrays of any framework in, arrays of the same framework out.

Everything that knows a framework lives in this package, and no framework is ever imported by it: an
array is recognised by its type, whose module must then be loaded already.
"""

from cusparge._arrays.adapters import adapter_for, adapter_of
from cusparge._arrays.protocol import Adapter
from cusparge._arrays.view import Device, DeviceArray, HostArray, Outline, View

__all__ = [
    "Adapter",
    "Device",
    "DeviceArray",
    "HostArray",
    "Outline",
    "View",
    "adapter_for",
    "adapter_of",
]
