"""The exceptions. Each is an ``Error``; those that have a counterpart in Python are that as well."""


class Error(Exception):
    """Any failure of nvtier. The text says what was tried, what is wrong, and what to do."""


class NotFound(Error, FileNotFoundError):
    """No such name, region or member."""


class Exists(Error, FileExistsError):
    """The name is taken."""


class NotADirectory(Error, NotADirectoryError):
    """A directory was needed."""


class IsADirectory(Error, IsADirectoryError):
    """A directory cannot be used so."""


class NotEmpty(Error, OSError):
    """The directory holds entries."""


class NoSpace(Error, OSError):
    """The pool, its quota, or the file system under it is full."""


class ReadOnly(Error, OSError):
    """The pool or the session is read-only."""


class PermissionDenied(Error, PermissionError):
    """The operating system or the pool's owner refused."""


class PoolBusy(Error, BlockingIOError):
    """Another process owns the pool and lets nobody in, or the region is being written already."""


class Corrupt(Error):
    """Bytes fail their checksum; the text names region, chunk and member."""


class Malformed(Error, ValueError):
    """A tensor file's header breaks its format."""


class NotAPool(Error):
    """There is no pool, another one, or one of a newer format."""


class NotSupported(Error, NotImplementedError):
    """Not supported for this pool, region or platform."""


class Timeout(Error, TimeoutError):
    """A deadline passed."""


class NoTensor(Error, KeyError):
    """No tensor of that name in the file or region."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument.
        return str(self.args[0]) if self.args else ""


class NoDevice(Error, RuntimeError):
    """There is no such device."""


class NoDriver(NoDevice):
    """There is no CUDA driver library here."""


class OldDriver(NoDevice):
    """The CUDA driver lacks what is needed."""


class DeviceError(Error, RuntimeError):
    """The device or its driver failed."""


class OutOfMemory(Error, MemoryError):
    """There is not enough memory; nothing was kept of the load."""


class OutOfDeviceMemory(OutOfMemory):
    """The device has not enough memory free."""


class OutOfHostMemory(OutOfMemory):
    """The host has not enough memory, or a limit such as RLIMIT_MEMLOCK was hit."""


class Changed(Error, OSError):
    """A file or region was truncated, replaced or written to while it was loaded."""


class Cancelled(Error):
    """The load or save was cancelled; nothing was kept of it."""


class DriveError(Error, OSError):
    """A drive, a file system or a pool failed while it was read or written."""


class Forked(Error, RuntimeError):
    """The object was made before a fork and is used in the child."""


class Closed(Error, ValueError):
    """The pool, region or file is closed."""


class InvalidArgument(Error, ValueError):
    """A name, offset or size that no call of this kind takes."""


class SharedTensors(InvalidArgument, RuntimeError):
    """Tensors to save share memory."""
