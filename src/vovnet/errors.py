"""The exceptions that users meet, each with its own exit code in the command line."""


class ConfigError(ValueError):
    """A wrong argument, setting or model folder (exit code 2)."""


class DataError(ValueError):
    """Bad input data: a missing, broken or contradictory file (exit code 3)."""


class ImageError(DataError):
    """One image file that cannot be used."""


class TrainingError(RuntimeError):
    """A training that cannot go on (exit code 1)."""
