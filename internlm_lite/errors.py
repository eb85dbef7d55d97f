"""Every error a user can meet. Each carries the exit code of the process (docs/running.md lists them).

A message says what was found, what was expected, and what to change.
"""

STOPPED = 3
"""Exit code after a signal or the stop file asked for it, and what was trained is saved."""
HANG = 4
"""Exit code when the job stands still."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class InternLMError(Exception):
    """Base of all errors whose message is meant for the user: shown without a traceback."""

    exit_code = 1
    guilty: tuple[int, ...] = ()
    """Where all ranks raise it alike: those that it befell. Empty: this one."""


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
    """The bytes of this checkpoint are not those that were saved; an older checkpoint may be good."""


class StorageError(InternLMError):
    """Storage refused or lost bytes: full, read-only, unreachable."""

    exit_code = 6


class NumericsError(InternLMError):
    """Training diverged beyond what skipping steps can mend."""

    exit_code = 7


class PeerLostError(InternLMError):
    """Another rank of the job died or can no longer be reached."""

    exit_code = 5


class MissingPackageError(InternLMError):
    """An optional package is needed for what was asked; the message holds the install command."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """What an error of torch says, without the frames of C++ below it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
