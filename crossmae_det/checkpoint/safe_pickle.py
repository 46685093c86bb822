"""Reading plain pickles of arrays, containers and plain values without executing them.

detectron2's zoo stores weights as pickled dicts of numpy arrays. A pickle is a program that calls
the functions it names; here, every name that it may use stands for a function of this module. Files
of ``torch.save`` are read by torch with the same stand-ins.
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
from typing import IO, Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

# Largest side and number of dimensions of an array; larger ones are rejected before multiplying.
MAX_SIDE, MAX_DIMENSIONS = 2**48, 32

# Largest number of elements of a tuple with everything nested in it; checkpoints have shapes.
MAX_NESTED = 10_000

# Kinds of numpy's types: of arrays, and in addition of scalars (complex numbers and text).
ARRAY_KINDS, SCALAR_KINDS = "biuf", "cSU"

# Types that a pickle may name but not call.
BUILT_IN_TYPES = (
    *("list", "dict", "tuple", "str", "unicode", "int", "long", "float", "complex", "bool"),
    "object",
)
NUMPY_TYPES = (
    *("bool", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)
DATES = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)


def not_admitted(name: str) -> str:
    """Why a file that uses ``name`` is rejected, and what to do."""
    return (
        f"it uses {name[:80]}, but only tensors and plain values are allowed: if you trust it,"
        " save its weights alone (torch.load with weights_only=False, then torch.save)"
    )


# Stand-ins


class PickledType:
    """Stand-in for a numpy dtype of numbers or, for scalars, of text."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        dtype = np.dtype(name) if isinstance(name, str) else None
        number = dtype is not None and dtype.kind in ARRAY_KINDS and dtype.itemsize <= 8
        if dtype is None or not (number or dtype.kind in SCALAR_KINDS):
            raise ValueError(not_admitted(f"an array of {name!r}"))
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        """Take the byte order from the state of a dtype: (version, order, ...)."""
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """Stand-in for a numpy array; ``tensor`` is None until the state arrives."""

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        """Take the state of an array: (version, shape, dtype, is Fortran order, bytes).

        Raises:
            ValueError: the state has another form, or its bytes do not fill the shape.
        """
        _, shape, dtype, fortran, data = state
        sides = [side for side in shape if type(side) is int and 0 <= side < MAX_SIDE]
        valid = len(sides) == len(shape) <= MAX_DIMENSIONS
        if not valid or not isinstance(dtype, PickledType):
            raise ValueError("an array has no valid shape and type")
        if dtype.dtype.kind not in ARRAY_KINDS:
            raise ValueError(not_admitted(f"an array of {dtype.dtype}"))
        if isinstance(data, str):  # Python 2's bytes
            data = data.encode("latin1")
        # Before any memory is allocated: the shape may claim anything.
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {tuple(shape)} has {len(data)} bytes")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        # A copy that torch can own, in the byte order of this machine.
        native = array.astype(dtype.dtype.newbyteorder("="), order="C", copy=True)
        self.tensor = torch.from_numpy(native)


class PickledNamespace(Namespace):
    """Stand-in for a command line, or for another object that has attributes only."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _new_array(*_: Any) -> PickledArray:
    return PickledArray()


def _array_from_buffer(data: bytes, dtype: PickledType, shape: Any, order: str) -> PickledArray:
    """The form of an array in protocol 5."""
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: PickledType, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    if not raw and not dtype.dtype.itemsize:
        return dtype.dtype.type().item()  # an empty string
    (value,) = np.frombuffer(raw, dtype.dtype)
    return value.item()


def _ordered_dict(items: Any = ()) -> dict:
    """Python 3 creates an OrderedDict empty, Python 2 from pairs."""
    pairs = [(key, value) for key, value in items]
    if not all(isinstance(key, str | int) for key, _ in pairs):
        raise ValueError("a key of a dict is neither a string nor an integer")
    return dict(pairs)


def _mapping(items: Any = (), *_: Any) -> dict:
    """A Counter is created from a dict, a defaultdict empty with its factory."""
    return dict(items) if type(items) is dict else {}


def _list(items: Iterable = (), *_: Any) -> list:
    """Sets become lists, so that nothing is hashed, and so do deques."""
    return list(items)


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _date(kind: Callable[..., Any]) -> Callable[..., Any]:
    """A class of ``datetime``, which validates its arguments."""

    def stand_in(*arguments: Any) -> Any:
        return kind(*arguments)

    return stand_in


def _type(*_: Any) -> None:
    """A type as the factory of a defaultdict, or as the value of an option."""
    raise ValueError("it creates an object of a type that checkpoints only name")


def _encode(text: str, encoding: str) -> bytes:
    """The form of bytes in protocol 2."""
    if encoding != "latin1":
        raise ValueError(f"it has bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """The form of empty bytes up to protocol 2."""
    return b""


# Every name that a pickle may use, and what it stands for.
ADMITTED: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _mapping,
    "collections.defaultdict": _mapping,
    "collections.deque": _list,
    "argparse.Namespace": PickledNamespace,
    "types.SimpleNamespace": PickledNamespace,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledType,
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    **{f"__builtin__.{name}": _list for name in ("set", "frozenset")},
    **{
        f"{module}.{kind}Path": _windows_path if "Windows" in kind else _posix_path
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
    },
    **{f"datetime.{kind.__name__}": _date(kind) for kind in DATES},
    **{f"__builtin__.{name}": _type for name in BUILT_IN_TYPES},
    **{f"numpy.{name}": _type for name in NUMPY_TYPES},
}


# Reading

_DISPATCH = pickle._Unpickler.dispatch  # opcode -> method


# The Python implementation: the C one allocates memory for any memo index that a file names.
class ArrayUnpickler(pickle._Unpickler):
    """Admits :data:`ADMITTED` and nothing else.

    Keys of dicts must be strings or integers, because hashing nested tuples can take forever or
    exhaust the stack; for the same reason, sets become lists.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 calls its modules numpy._core, Python 3 its built-in names builtins.
        module = module.replace("numpy._core", "numpy.core").replace("builtins", "__builtin__")
        stand_in = ADMITTED.get(f"{module}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(not_admitted(f"{module}.{name}"))
        return stand_in

    def _build(self) -> None:
        """Set the state of a stand-in; pickle would set attributes of any object."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, PickledArray | PickledType | PickledNamespace):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
        target.__setstate__(state)

    def _bytearray8(self) -> None:
        """Read bytes; pickle would first allocate as many as the file claims to have."""
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) is not dict or not isinstance(key, str | int):
                raise pickle.UnpicklingError(f"it uses a {type(key).__name__} as a key")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_marked_items(self) -> None:
        self._set_items(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    dispatch: ClassVar[Any] = {
        **_DISPATCH,
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray8,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_marked_items,
        pickle.DICT[0]: _dict,
        pickle.EMPTY_SET[0]: _DISPATCH[pickle.EMPTY_LIST[0]],
        pickle.ADDITEMS[0]: _DISPATCH[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: _DISPATCH[pickle.LIST[0]],
    }


def check_tuples(file: IO[bytes]) -> None:
    """Reject a pickle of endlessly nested tuples, whose hash would take forever.

    torch's own reader hashes any key. The instructions are inspected, not followed.

    Args:
        file: at the start of a pickle; left at its end.

    Raises:
        ValueError: it is nested more deeply than any checkpoint, or is not a pickle.
    """
    sizes: list[int] = []  # of the values on the pickle's stack, with everything nested in them
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            marks.append(len(sizes))
        elif name.startswith(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")):
            memo[len(memo) if name == "MEMOIZE" else argument] = sizes[-1] if sizes else 1
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            sizes.append(memo.get(argument, 1))
        else:
            start = kept = max(0, len(sizes) - len(opcode.stack_before))
            if pickletools.markobject in opcode.stack_before:
                start = marks.pop() if marks else 0
                kept = max(0, start - opcode.stack_before.index(pickletools.markobject))
            size = 1 + sum(sizes[start:]) if "TUPLE" in name or name == "DUP" else 1
            if size > MAX_NESTED:
                raise ValueError("it nests tuples more deeply than any checkpoint does")
            del sizes[kept:]
            sizes += [size] * len(opcode.stack_after)


class BoundedFile(io.RawIOBase):
    """A file that raises EOFError when a pickle asks for more bytes than are left."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.left = size

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= self.left:
            raise EOFError("it is truncated")
        self.left -= count
        return self.file.read(count)

    def readline(self, size: int | None = -1) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


def read_pickle(path: Path) -> Any:
    """Read a pickle of arrays and plain values, from Python 2 or 3.

    Returns:
        The content, with tensors for arrays.

    Raises:
        ValueError: the file is not a pickle, is damaged, or holds anything else.
    """
    with path.open("rb") as file:
        bounded = BoundedFile(file, path.stat().st_size)
        try:
            return with_tensors(ArrayUnpickler(bounded, encoding="latin1").load())
        except KeyError as error:  # a byte that is not an instruction
            raise ValueError("it is not a file of torch.save, safetensors or pickle") from error
        except Exception as error:  # damaged bytes can raise anything
            raise ValueError(str(error) or type(error).__name__) from error


def with_tensors(content: Any, levels: int = 2) -> Any:
    """Replace stand-ins of arrays by tensors, in a dict and the dicts in it, not deeper."""
    if isinstance(content, PickledArray):
        if content.tensor is None:
            raise ValueError("an array has no numbers")
        return content.tensor
    if isinstance(content, dict) and levels:
        return {key: with_tensors(value, levels - 1) for key, value in content.items()}
    return content
