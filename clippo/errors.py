"""Everything that clippo raises on purpose.

    ClippoError
    ├── ConfigError      a setting, flag, path or class list that the user can mend
    ├── DataError        pictures, words or fonts that cannot be used
    ├── ModelError       an unknown or unloadable model
    ├── StoreError       a result store that cannot be read or written
    ├── ResourceError    more asked for than the cluster has
    └── TrialError       one trial failed; the sweep goes on
        └── DivergedError    its loss became NaN or infinite

The command line prints a ``ClippoError`` as one line and exits with status 2; a message therefore names
the value, the bound and the remedy.
"""


class ClippoError(Exception):
    """Base of all errors that clippo raises on purpose."""


class ConfigError(ClippoError):
    """A setting, flag, path or class list that the user can mend."""


class DataError(ClippoError):
    """Pictures, words or fonts that cannot be used."""


class ModelError(ClippoError):
    """An unknown or unloadable model."""


class StoreError(ClippoError):
    """A result store that cannot be read or written."""


class ResourceError(ClippoError):
    """More asked for than the cluster has."""


class TrialError(ClippoError):
    """One trial failed; the sweep goes on."""


class DivergedError(TrialError):
    """The loss of a trial became NaN or infinite."""
