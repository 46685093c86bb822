"""Plain pickles without execution: arrays, containers and plain values, and nothing else.

detectron2's zoo keeps weights as pickled dicts of numpy arrays. A pickle is a program that calls
what it names; here every name that it may use stands for a function of this module. Files of
``torch.save`` are read by torch with the same stand-ins.
"""

import datetime
import io
import math
import pickle
import pickletools
import struct
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Sides and dimensions of an array beyond which nothing need be multiplied to refuse it.
MOST, DIMENSIONS = 2**48, 32

# Elements of a tuple and of all that it holds: checkpoints have shapes and the like.
MOST_NESTED = 10_000

# Kinds of numpy's types: of arrays, and beside them of scalars, complex numbers and text.
NUMBERS, OF_SCALARS = "biuf", "cSU"

# Types that a pickle may name, and not call.
BUILT_IN_TYPES = (
    *("list", "dict", "tuple", "str", "unicode", "int", "long", "float", "complex", "bool"),
    "object",
)

NUMPY_TYPES = (
    *("bool", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)

DATES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)


class PickledArray:
    """What a pickle has in place of a numpy array until the numbers arrive."""

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        """Take the state of a numpy array: (version, shape, dtype, column by column, bytes).

        Raises:
            ValueError: it is no such state, or the bytes do not fill the shape.
        """
        _, shape, dtype, fortran, data = state
        sides = [side for side in shape if type(side) is int and 0 <= side < MOST]
        if (
            not isinstance(dtype, PickledType)
            or len(sides) != len(shape)
            or len(shape) > DIMENSIONS
        ):
            raise ValueError("an array without a shape and a type")
        if dtype.dtype.kind not in NUMBERS:
            raise ValueError(not_admitted(f"an array of {dtype.dtype}"))
        if isinstance(data, str):  # as Python 2 pickled bytes
            data = data.encode("latin1")
        # Before anything is made of that shape: it may be any number.
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {tuple(shape)} with {len(data)} bytes")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        # A copy that torch may own, in this machine's order of bytes.
        native = array.astype(dtype.dtype.newbyteorder("="), order="C", copy=True)
        self.tensor = torch.from_numpy(native)


class PickledType:
    """What a pickle has in place of a numpy dtype: of numbers and, for scalars, of text."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        dtype = np.dtype(name) if isinstance(name, str) else None
        usual = dtype is not None and dtype.kind in NUMBERS and dtype.itemsize <= 8
        if dtype is None or not (usual or dtype.kind in OF_SCALARS):
            raise ValueError(not_admitted(f"an array of {name!r}"))
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        """Take the byte order from the state of a numpy dtype: (version, order, ...)."""
        self.dtype = self.dtype.newbyteorder(state[1])


def not_admitted(name: str) -> str:
    """Why a file with something of that name is rejected, and what to do about it."""
    return (
        f"it asks for {name[:80]}, and only tensors and plain values are admitted: if you trust it,"
        " save its weights alone (torch.load with weights_only=False, then torch.save)"
    )


def _new_array(*_: Any) -> PickledArray:
    return PickledArray()


def _ordered(items: Any = ()) -> dict:
    """An ordered dict is made empty, or by Python 2 from pairs."""
    pairs = [(key, value) for key, value in items]
    if not all(isinstance(key, str | int) for key, _ in pairs):
        raise ValueError("an entry without a name")
    return dict(pairs)


def _from_buffer(data: bytes, dtype: PickledType, shape: Any, order: str) -> PickledArray:
    """How protocol 5 holds an array."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: PickledType, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not raw and not dtype.dtype.itemsize:
        return dtype.dtype.type().item()  # an empty text
    (value,) = np.frombuffer(raw, dtype.dtype)
    return value.item()


class PickledNamespace(Namespace):
    """A command line, or another object with nothing but attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _mapping(items: Any = (), *_: Any) -> dict:
    """A Counter is made from a dict; a defaultdict empty, with what makes its values."""
    return dict(items) if type(items) is dict else {}


def _items(items: Iterable = (), *_: Any) -> list:
    """Sets are lists, which hash nothing; so are deques."""
    return list(items)


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _moment(kind: Callable[..., Any]) -> Callable[..., Any]:
    """A class of ``datetime``, which checks what it is given."""

    def stand_in(*arguments: Any) -> Any:
        return kind(*arguments)

    return stand_in


def _type(*_: Any) -> None:
    """A type, as what makes the values of a defaultdict, or as the value of an option."""
    raise ValueError("it makes an object of a type that files of weights only name")


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocols up to 2 hold no bytes at all: a call of ``bytes`` without arguments."""
    return b""


# Everything that a pickle may name, and what it gets.
ADMITTED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _mapping,
    "collections.defaultdict": _mapping,
    "collections.deque": _items,
    "argparse.Namespace": PickledNamespace,
    "types.SimpleNamespace": PickledNamespace,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledType,
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    **{f"__builtin__.{name}": _items for name in ("set", "frozenset")},
    **{
        f"{module}.{kind}Path": _windows_path if "Windows" in kind else _posix_path
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
    },
    **{f"datetime.{kind.__name__}": _moment(kind) for kind in DATES},
    **{f"__builtin__.{name}": _type for name in BUILT_IN_TYPES},
    **{f"numpy.{name}": _type for name in NUMPY_TYPES},
}


# The Python implementation: the C one makes room for any memo index that a file names.
class ArrayUnpickler(pickle._Unpickler):
    """Admits :data:`ADMITTED` and nothing else."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name.

        Raises:
            UnpicklingError: there is none.
        """
        # numpy 2 calls its modules numpy._core, Python 3 its built-in names builtins.
        module = module.replace("numpy._core", "numpy.core").replace("builtins", "__builtin__")
        stand_in = ADMITTED.get(f"{module}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(not_admitted(f"{module}.{name}"))
        return stand_in

    def load_build(self) -> None:
        """Give a stand-in its state, where pickle itself sets attributes of anything."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        target = self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(target, PickledArray | PickledType | PickledNamespace):
            raise pickle.UnpicklingError(f"it gives a state to a {type(target).__name__}")
        target.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def load_bytearray8(self) -> None:
        """Read bytes, as many as there are: pickle makes room for as many as are claimed."""
        (count,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(self.read(count))  # type: ignore[attr-defined]

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8  # type: ignore[assignment]

    def load_setitem(self) -> None:
        """Put one item into a dict."""
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set([(key, value)])

    dispatch[pickle.SETITEM[0]] = load_setitem  # type: ignore[assignment]

    def load_setitems(self) -> None:
        """Put the items since the last mark into a dict."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._set(list(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.SETITEMS[0]] = load_setitems  # type: ignore[assignment]

    def load_dict(self) -> None:
        """Make a dict of the items since the last mark."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.append({})  # type: ignore[attr-defined]
        self._set(list(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.DICT[0]] = load_dict  # type: ignore[assignment]

    def _set(self, items: list[tuple[Any, Any]]) -> None:
        target = self.stack[-1]  # type: ignore[attr-defined]
        for key, value in items:
            # The hash of nested tuples can take for ever, or all of the interpreter's stack.
            if type(target) is not dict or not isinstance(key, str | int):
                raise pickle.UnpicklingError(f"a {type(key).__name__} is no name of an entry")
            target[key] = value

    # Sets are lists: nothing is hashed.
    def load_empty_set(self) -> None:
        """Begin a set."""
        self.append([])  # type: ignore[attr-defined]

    dispatch[pickle.EMPTY_SET[0]] = load_empty_set  # type: ignore[assignment]

    def load_additems(self) -> None:
        """Put the items since the last mark into a set."""
        items, target = self.pop_mark(), self.stack[-1]  # type: ignore[attr-defined]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"it adds items to a {type(target).__name__}")
        target.extend(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems  # type: ignore[assignment]

    def load_frozenset(self) -> None:
        """Make a frozen set of the items since the last mark."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.append(items)  # type: ignore[attr-defined]

    dispatch[pickle.FROZENSET[0]] = load_frozenset  # type: ignore[assignment]


def check_tuples(file: IO[bytes]) -> None:
    """Refuse a pickle that nests tuples without measure: their hash would take for ever.

    torch's own reader of weights hashes any key. The instructions are looked at, not followed; the
    file is left where the pickle ends.

    Args:
        file: open for reading, where a pickle begins.

    Raises:
        ValueError: it nests more than any checkpoint does, or is no pickle.
    """
    sizes: list[int] = []  # of what lies on the pickle's stack: elements, all the way down
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            marks.append(len(sizes))
            continue
        if name.startswith(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")):
            memo[len(memo) if name == "MEMOIZE" else argument] = sizes[-1] if sizes else 1
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            sizes.append(memo.get(argument, 1))
            continue
        if pickletools.markobject in opcode.stack_before:
            begin = marks.pop() if marks else 0
            kept = opcode.stack_before.index(pickletools.markobject)
            taken = sizes[begin:]
            del sizes[max(0, begin - kept) :]
        else:
            begin = max(0, len(sizes) - len(opcode.stack_before))
            taken = sizes[begin:]
            del sizes[begin:]
        size = 1 + sum(taken) if "TUPLE" in name or name == "DUP" else 1
        if size > MOST_NESTED:
            raise ValueError("it nests tuples as no checkpoint does")
        sizes += [size] * len(opcode.stack_after)


class Bounded(io.RawIOBase):
    """A file that refuses to be asked for more than it has: a length in a pickle may be any number.

    Args:
        file: open for reading.
        size: of the file in bytes.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.left = size

    def read(self, count: int = -1) -> bytes:
        """``count`` bytes.

        Raises:
            EOFError: there are fewer.
        """
        if not 0 <= count <= self.left:
            raise EOFError("it ends before its end")
        self.left -= count
        return self.file.read(count)

    def readline(self, size: int | None = -1) -> bytes:
        """The rest of a line."""
        line = self.file.readline()
        self.left -= len(line)
        return line


def read_pickle(path: Path) -> Any:
    """Read a pickle of arrays and plain values, from Python 2 or 3.

    Args:
        path: the file.

    Returns:
        What it holds; arrays are tensors.

    Raises:
        ValueError: it is no pickle, is damaged, or holds anything else.
    """
    with path.open("rb") as file:
        bounded = Bounded(file, path.stat().st_size)
        try:
            return with_tensors(ArrayUnpickler(bounded, encoding="latin1").load())
        except KeyError as error:
            # What pickle says of a byte that is no instruction.
            raise ValueError("it is no file of torch.save, safetensors or pickle") from error
        except Exception as error:  # damaged bytes can stumble over anything
            raise ValueError(str(error) or type(error).__name__) from error


def with_tensors(content: Any, levels: int = 2) -> Any:
    """Put tensors in place of arrays, in a dict and in the dicts that it holds, not deeper."""
    if isinstance(content, PickledArray):
        if content.tensor is None:
            raise ValueError("an array without numbers")
        return content.tensor
    if isinstance(content, dict) and levels:
        return {key: with_tensors(value, levels - 1) for key, value in content.items()}
    return content
