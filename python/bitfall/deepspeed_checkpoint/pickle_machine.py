"""A pickle reader that runs no foreign code: the opcodes that torch.save writes, and nothing else.

A pickle is a program for a small stack machine. The standard library's machine calls whatever the
program names and can be made to crash or to fill the memory; this one knows only the opcodes of
protocol 2, calls only what `resolve` hands out as a Constructor, and lets only plain values become
dictionary keys (nested tuples could make hashing endless).

Source of the opcodes: the documentation of Python's module pickletools.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INTEGER_BYTES = 64
MAX_NAME_BYTES = 512


class PickleError(ValueError):
    """The pickle is damaged or asks for something that is not allowed."""


@dataclass(frozen=True)
class Constructor:
    """Something a pickle may call: its name in Python and what is done instead."""

    name: str
    call: Callable[..., Any]


@dataclass(eq=False)
class Inert:
    """Stand-in for an object whose class is not run: it only holds what the pickle says of it."""

    class_name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def attribute(self, name: str) -> Any:
        """Value of an instance attribute; None where there is none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


_MARK = object()


class PickleMachine:
    """Runs one pickle after another from a stream.

    `resolve(name)` gives the value of a global such as "torch.Size" and raises PickleError for
    names that are not allowed; `load_persistent(identifier)` gives what a persistent id stands for.
    """

    def __init__(
        self,
        stream: BinaryIO,
        resolve: Callable[[str], Any],
        load_persistent: Callable[[Any], Any],
    ) -> None:
        self._stream = stream
        self._resolve = resolve
        self._load_persistent = load_persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The object of the next pickle. Raises PickleError for whatever is wrong with it."""
        self._stack, self._memo = [], {}
        while True:
            opcode = self._read(1)
            if opcode == b".":
                break
            action = _ACTIONS.get(opcode)
            if action is None:
                raise PickleError(f"opcode {opcode!r} is not one that torch.save writes")
            action(self)
        if len(self._stack) != 1:
            raise PickleError("the pickle ends with more than one object")
        return self._pop()

    def _read(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) != count:
            raise PickleError("the pickle ends too early")
        return data

    def _number(self, layout: str) -> int:
        return int(struct.unpack(layout, self._read(struct.calcsize(layout)))[0])

    def _line(self) -> str:
        line = self._stream.readline(MAX_NAME_BYTES)
        if not line.endswith(b"\n"):
            raise PickleError("the name of a class has no end")
        return line[:-1].decode("utf-8", errors="replace")

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise PickleError("an opcode misses its operand")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise PickleError("an opcode misses its mark")

    def _top(self, kind: type, what: str) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise PickleError(f"{what} without a {kind.__name__} to put it in")
        return self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _put(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self._push(value)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise PickleError("a reference to an object that is not there")
        self._push(self._memo[index])

    def _integer(self, count: int) -> None:
        if not 0 <= count <= MAX_INTEGER_BYTES:
            raise PickleError(f"an integer of {count} bytes")
        self._push(int.from_bytes(self._read(count), "little", signed=True))

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._read(8))[0])

    def _text(self) -> None:
        try:
            self._push(self._read(self._number("<I")).decode("utf-8", errors="surrogatepass"))
        except UnicodeDecodeError:
            raise PickleError("a text is not UTF-8") from None

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _append(self, items: list[Any]) -> None:
        self._top(list, "list items").extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2 != 0:
            raise PickleError("a dictionary key without a value")
        target = self._top(dict, "dictionary items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def _append_one(self) -> None:
        item = self._pop()
        self._append([item])

    def _set_one(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._push(self._resolve(f"{module}.{name}"))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Constructor) or not isinstance(arguments, tuple):
            raise PickleError("a call of something that is not a class or function")
        try:
            self._push(function.call(*arguments))
        except TypeError:
            raise PickleError(f"wrong arguments for {function.name}") from None

    def _build(self) -> None:
        state = self._pop()
        target = self._top(object, "a state")
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # a dict's attributes, such as _metadata, say nothing
            raise PickleError(f"a state for a {type(target).__name__}")

    def _persistent(self) -> None:
        self._push(self._load_persistent(self._pop()))


def hashable(value: Any) -> Any:
    """`value` if it may be a dictionary key or in a set; PickleError otherwise."""
    plain = (str, int, float, bytes, type(None))
    if isinstance(value, plain) or (
        isinstance(value, tuple) and all(isinstance(item, plain) for item in value)
    ):
        return value
    raise PickleError(f"a {type(value).__name__} as a dictionary key")


_ACTIONS: dict[bytes, Callable[[PickleMachine], None]] = {
    b"\x80": lambda m: _check_protocol(m._number("<B")),
    b"(": lambda m: m._push(_MARK),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"J": lambda m: m._push(m._number("<i")),
    b"\x8a": lambda m: m._integer(m._number("<B")),
    b"\x8b": lambda m: m._integer(m._number("<i")),
    b"G": PickleMachine._float,
    b"X": PickleMachine._text,
    b")": lambda m: m._push(()),
    b"]": lambda m: m._push([]),
    b"}": lambda m: m._push({}),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"a": PickleMachine._append_one,
    b"e": lambda m: m._append(m._pop_to_mark()),
    b"s": PickleMachine._set_one,
    b"u": lambda m: m._set_items(m._pop_to_mark()),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"h": lambda m: m._get(m._number("<B")),
    b"j": lambda m: m._get(m._number("<I")),
    b"c": PickleMachine._global,
    b"R": PickleMachine._reduce,
    b"\x81": PickleMachine._reduce,  # NEWOBJ: cls.__new__(cls, *arguments)
    b"b": PickleMachine._build,
    b"Q": PickleMachine._persistent,
}


def _check_protocol(protocol: int) -> None:
    if protocol != 2:
        raise PickleError(f"pickle protocol {protocol}; torch.save writes 2")
