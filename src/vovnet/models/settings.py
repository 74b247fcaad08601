"""Settings of networks, checked by the types that their dataclasses declare."""

from collections.abc import Iterable
from dataclasses import Field, fields
from itertools import pairwise
from sys import float_info
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin

from vovnet.errors import ConfigError

MAX_COUNT = 100_000  # of classes, detections, channels: above it only memory runs out
_SHARES = ("_threshold", "_iou", "_fraction")  # endings of the names of numbers in 0..1
_RISING = "_limits"  # ending of the names of lists in which each number is above the one before


class Settings(Protocol):
    """Any dataclass instance."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def check_settings(config: Settings) -> None:
    """Raises ConfigError on a field that has not its declared type and range; lists become tuples.

    Whole numbers are in 1..MAX_COUNT; other numbers are finite and at least 0, those in tuples
    above 0, and shares (thresholds, IoUs, fractions) in 0..1. Limits rise.
    """
    for field in fields(config):
        value = _check(field.name, field.type, getattr(config, field.name))
        object.__setattr__(config, field.name, value)  # frozen, and this is its construction


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raises ConfigError unless value is a whole number in least..MAX_COUNT."""
    if type(value) is not int or not least <= value <= MAX_COUNT:
        raise _refusal(name, f"a whole number in {least}..{MAX_COUNT}", value)


def check_groups(name: str, channels: Iterable[int], *, groups: int) -> None:
    """Raises ConfigError where GroupNorm's groups do not divide a number of channels."""
    for count in channels:
        if count % groups:
            raise _refusal(name, f"multiples of {groups}, as GroupNorm needs", count)


def _check(name: str, kind: Any, value: Any) -> Any:
    options = get_args(kind)
    if get_origin(kind) is tuple:
        return _check_tuple(name, options, value)
    if get_origin(kind) is Literal:
        if value not in options:
            raise _refusal(name, f"one of {', '.join(options)}", value)
    elif kind is bool:
        if type(value) is not bool:
            raise _refusal(name, "true or false", value)
    elif kind is float:
        _check_number(name, value)
    elif not (value is None and type(None) in options):
        check_count(name, value)
    return value


def _check_tuple(name: str, options: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    any_length = options[-1] is ...
    if not isinstance(value, list | tuple) or not (any_length or len(value) == len(options)):
        raise _refusal(name, "a list" if any_length else f"a list of {len(options)}", value)
    if options[0] is float and not all(isinstance(v, int | float) and v > 0 for v in value):
        raise _refusal(name, "numbers above 0", value)
    checked = tuple(_check(name, options[0], item) for item in value)
    if name.endswith(_RISING) and any(low >= high for low, high in pairwise(checked)):
        raise _refusal(name, "numbers that rise", value)
    return checked


def _check_number(name: str, value: object) -> None:
    share = name.endswith(_SHARES)
    largest = 1 if share else float_info.max
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= largest:  # type: ignore[operator]
        raise _refusal(name, "a number in 0..1" if share else "a number of at least 0", value)


def _refusal(name: str, expected: str, value: object) -> ConfigError:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return ConfigError(f"model settings: {name}: expected {expected}, got {text[:200]}")
