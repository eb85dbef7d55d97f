"""Every error a user can meet. Each carries the exit code of the process (docs/running.md lists them).

A message says what was found, what was expected, and what to change.
"""

STOPPED = 3
"""Exit code after a stop on request, by a signal or the stop file; the trained state is saved."""
HANG = 4
"""Exit code when the job hangs."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


class InternLMError(Exception):
    """Base of all errors whose message is meant for the user: shown without a traceback."""

    exit_code = 1
    culprit_ranks: tuple[int, ...] = ()
    """For an error that all ranks raise together: the ranks that caused it. Empty: this rank."""


class ConfigError(InternLMError):
    """The config file or the command line is wrong. Holds all problems at once, one a line."""

    exit_code = 2


class DataError(InternLMError):
    """Tokenised data or a tokenizer is missing, damaged, or does not fit the model."""

    exit_code = 2


class MeshError(InternLMError):
    """The processes that were started do not fit the layout, or cannot find each other."""

    exit_code = 2


class CheckpointError(InternLMError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 2


class DamagedError(CheckpointError):
    """This checkpoint is of no use: its bytes have changed since it was saved, or it holds numbers that are not finite.
    An older one may be good."""


class StorageError(InternLMError):
    """Storage refused or lost bytes: full, read-only, unreachable."""

    exit_code = 6


class NumericsError(InternLMError):
    """Training diverged, and skipping steps does not help."""

    exit_code = 7


class PeerLostError(InternLMError):
    """Another rank of the job died or can no longer be reached."""

    exit_code = 5


class MissingPackageError(InternLMError):
    """A requested feature needs an optional package; the message has the install command."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """The message of an error of torch, without its C++ frames."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
