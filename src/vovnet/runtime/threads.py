"""How many CPU threads an engine may be told to use."""

from vovnet.errors import ConfigError

MAX_THREADS = 1024


def check_threads(threads: int | None) -> None:
    """Raises ConfigError unless it is None, the engine's own choice, or a count in 1..MAX_THREADS.

    Far above the number of cores torch ends the process without a word.
    """
    if threads is None:
        return
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads: expected a whole number in 1..{MAX_THREADS}, got {threads!r}")
