"""Errors of the Python side that the user can mend: shown as one message, without a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong; the message says where, what was seen and what to do."""


class ArgumentsError(InputError):
    """A flag or a combination of flags is wrong."""


class DataError(InputError):
    """A data, model or tokenizer file cannot be used as it is."""


class UsageError(InputError, RuntimeError):
    """The engine was called in an order, or with an object, that it cannot work with."""
