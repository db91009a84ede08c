"""Tensor files on NVMe pools, and loads of tensor files into GPUs. See ``load``, ``Pool``, and the modules ``nvtier.torch``,
``nvtier.numpy`` and ``nvtier.patch``, which are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

from ._errors import (
    Cancelled,
    Changed,
    Closed,
    Corrupt,
    DeviceError,
    DriveError,
    Error,
    Exists,
    Forked,
    InvalidArgument,
    IsADirectory,
    Malformed,
    NoDevice,
    NoDriver,
    NoSpace,
    NoTensor,
    NotADirectory,
    NotAPool,
    NotEmpty,
    NotFound,
    NotSupported,
    OldDriver,
    OutOfDeviceMemory,
    OutOfHostMemory,
    OutOfMemory,
    PermissionDenied,
    PoolBusy,
    ReadOnly,
    SharedTensors,
    Timeout,
)
from ._load import Loaded, load, save
from ._nvtier import (
    DeviceTensor,
    Entry,
    Pool,
    Region,
    Tensor,
    __version__,
    device_info,
    format,
    trim,
)

if TYPE_CHECKING:
    from . import kv, numpy, stream, torch, train, transformers

__all__ = [
    "Cancelled",
    "Changed",
    "Closed",
    "Corrupt",
    "DeviceError",
    "DeviceTensor",
    "DriveError",
    "Entry",
    "Error",
    "Exists",
    "Forked",
    "InvalidArgument",
    "IsADirectory",
    "Loaded",
    "Malformed",
    "NoDevice",
    "NoDriver",
    "NoSpace",
    "NoTensor",
    "NotADirectory",
    "NotAPool",
    "NotEmpty",
    "NotFound",
    "NotSupported",
    "OldDriver",
    "OutOfDeviceMemory",
    "OutOfHostMemory",
    "OutOfMemory",
    "PermissionDenied",
    "Pool",
    "PoolBusy",
    "ReadOnly",
    "Region",
    "SharedTensors",
    "Tensor",
    "Timeout",
    "__version__",
    "device_info",
    "format",
    "load",
    "save",
    "trim",
]


def __getattr__(name: str) -> Any:
    # torch, numpy and transformers are imported by who uses them, not by `import nvtier`. (`nvtier.patch` acts when it is imported.)
    if name in ("torch", "numpy", "kv", "transformers", "train", "stream"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
