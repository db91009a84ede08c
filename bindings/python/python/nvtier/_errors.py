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


class InvalidArgument(Error, ValueError):
    """A name, offset or size that no call of this kind takes."""
