"""What a call may carry: the rules of the front door, one function an argument.

Rules:
1. A value is accepted as it is or refused with `InvalidCall`; nothing is rounded, cut or guessed.
2. What comes back is of the exact built-in type: a subclass's own methods never run. The type alone tells what a value
   is; `isinstance` would ask the value, and a mock or a proxy lies.
3. Names have 1 to 512 bytes in UTF-8, no NUL (Postgres text cannot hold one), no lone surrogate (UTF-8 has none).
4. Tokens are integers within ±(2**63 - 1), the range of `bigint` less its odd one out.
5. Costs are finite; a float counts as the decimal that `repr` prints. They have at most 2,000 digits before the point
   and 16,383 after: sums fit `numeric`, and no call holds the interpreter.
"""

from __future__ import annotations

from decimal import Decimal
from operator import index
from typing import Final, TypeAlias

from tracker_daemon.errors import InvalidCall

NAME_BYTES: Final = 512
TOKENS_LIMIT: Final = 2**63

# An int becomes decimal in quadratic time: 0.1 ms with 2,000 digits, 260 ms with the 131,072 that `numeric` can hold.
# Floats have at most 309, and what is added up here stays far from `numeric`'s end.
COST_DIGITS_BEFORE: Final = 2_000
# PostgreSQL manual, "Arbitrary Precision Numbers": up to 16,383 digits after the point.
COST_DIGITS_AFTER: Final = 16_383
_COST_LIMIT: Final = 10**COST_DIGITS_BEFORE

Cost: TypeAlias = "int | float | Decimal"


def name(argument: str, value: object) -> str:
    """Return *value* as a plain `str`, or raise `InvalidCall` naming *argument* (rule 3)."""
    if not issubclass(type(value), str):
        raise InvalidCall(argument, "must be a str", value)
    text = str.__add__("", value)  # type: ignore[operator]
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidCall(argument, "must not contain a lone surrogate", value) from None
    if not size:
        raise InvalidCall(argument, "must not be empty", value)
    if size > NAME_BYTES:
        raise InvalidCall(argument, f"must have at most {NAME_BYTES} bytes in UTF-8, has {size}", value)
    if "\0" in text:
        raise InvalidCall(argument, "must not contain NUL", value)
    return text


def optional_name(argument: str, value: object) -> str | None:
    """Return *value* as `name` does, or `None` for `None`."""
    return None if value is None else name(argument, value)


def tokens(value: object) -> int:
    """Return *value* as a plain `int` (rule 4); anything with `__index__` but `bool`."""
    if type(value) is bool:
        raise InvalidCall("tokens", "must be an integer, not a bool", value)
    try:
        # A plain one has no method that could fail: what is raised there is a signal handler's.
        number = value if type(value) is int else int(index(value))  # type: ignore[arg-type]  # else a TypeError
    except TypeError:
        raise InvalidCall("tokens", "must be an integer", value) from None
    except Exception as error:
        raise InvalidCall("tokens", f"has an __index__ that fails ({type(error).__name__})", value) from error
    if not -TOKENS_LIMIT < number < TOKENS_LIMIT:
        raise InvalidCall("tokens", "must be between -(2**63 - 1) and 2**63 - 1", value)
    return number


def cost(value: object) -> Cost:
    """Return *value* as a plain `int`, `float` or `Decimal` (rule 5)."""
    kind = type(value)
    if kind is bool:
        raise InvalidCall("cost", "must be an int, float or Decimal, not a bool", value)
    if issubclass(kind, int):
        whole = int.__int__(value)  # type: ignore[arg-type]
        if not -_COST_LIMIT < whole < _COST_LIMIT:
            raise InvalidCall("cost", f"must have at most {COST_DIGITS_BEFORE} digits before the point", value)
        return whole
    if issubclass(kind, float):
        plain = float.__float__(value)  # type: ignore[arg-type]
        if plain - plain != 0:
            raise InvalidCall("cost", "must be finite", value)
        return plain
    if issubclass(kind, Decimal):
        return _decimal(value)  # type: ignore[arg-type]
    raise InvalidCall("cost", "must be an int, float or Decimal", value)


def _decimal(value: Decimal) -> Decimal:
    plain = value if type(value) is Decimal else Decimal(value)
    if not plain.is_finite():
        raise InvalidCall("cost", "must be finite", value)
    exponent = plain.as_tuple().exponent
    if isinstance(exponent, int) and -exponent > COST_DIGITS_AFTER:
        raise InvalidCall("cost", f"must have at most {COST_DIGITS_AFTER} digits after the point", value)
    if plain.adjusted() >= COST_DIGITS_BEFORE:
        raise InvalidCall("cost", f"must have at most {COST_DIGITS_BEFORE} digits before the point", value)
    return plain


def decimal(value: Cost) -> Decimal:
    """Return a checked cost as the decimal it counts as (rule 5)."""
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
