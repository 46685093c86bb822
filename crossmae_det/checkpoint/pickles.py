"""Plain pickles without execution: arrays, containers and plain values, and nothing else.

detectron2's zoo keeps weights as pickled dicts of numpy arrays. A pickle is a program that calls
what it names; here every name that it may use stands for a function of this module.
"""

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Sides and dimensions of an array beyond which nothing need be multiplied to refuse it.
MOST, DIMENSIONS = 2**48, 32
# Elements of a tuple and of all that it holds: checkpoints have shapes and the like.
MOST_NESTED = 10_000


class PickledArray:
    """What a pickle has in place of a numpy array until the numbers arrive."""

    tensor: Tensor | None = None

    def restore(self, state: Any) -> None:
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
    """What a pickle has in place of a numpy dtype: booleans, integers and floats only."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        dtype = np.dtype(name) if isinstance(name, str) else None
        if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise ValueError(f"an array of {name!r}")
        self.dtype = dtype

    def restore(self, state: Any) -> None:
        """Take the byte order from the state of a numpy dtype: (version, order, ...)."""
        self.dtype = self.dtype.newbyteorder(state[1])


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
    array.restore((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: PickledType, data: bytes | str) -> bool | int | float:
    raw = data.encode("latin1") if isinstance(data, str) else data
    (value,) = np.frombuffer(raw, dtype.dtype)
    return value.item()


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
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledType,
    "numpy.core.multiarray._reconstruct": _new_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
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
        # numpy 2 calls its modules numpy._core.
        stand_in = ADMITTED.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only arrays and plain values are admitted"
            )
        return stand_in

    def load_build(self) -> None:
        """Give an object its state: an array or a type, where pickle itself sets attributes."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        target = self.stack[-1]  # type: ignore[attr-defined]
        if not isinstance(target, PickledArray | PickledType):
            raise pickle.UnpicklingError(f"it gives a state to a {type(target).__name__}")
        target.restore(state)

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


for _unused in (pickle.ADDITEMS, pickle.FROZENSET):  # they hash, too, and no weights lie in sets
    del ArrayUnpickler.dispatch[_unused[0]]


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
            return _tensors(ArrayUnpickler(bounded, encoding="latin1").load())
        except KeyError as error:
            # What pickle says of a byte that is no instruction.
            raise ValueError("it is no file of torch.save, safetensors or pickle") from error
        except Exception as error:  # damaged bytes can stumble over anything
            raise ValueError(str(error) or type(error).__name__) from error


def _tensors(content: Any, levels: int = 2) -> Any:
    """Put tensors in place of arrays, in a dict and in the dicts that it holds, not deeper."""
    if isinstance(content, PickledArray):
        if content.tensor is None:
            raise ValueError("an array without numbers")
        return content.tensor
    if isinstance(content, dict) and levels:
        return {key: _tensors(value, levels - 1) for key, value in content.items()}
    return content
