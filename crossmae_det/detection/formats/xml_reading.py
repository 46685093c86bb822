"""XML as small trees that know their lines, read one child of the root at a time.

Document types are rejected, so that entities cannot expand: annotation tools write none.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

_CHUNK = 1 << 20  # bytes


@dataclass
class Element:
    """An element: its name, attributes, children, text and line in the file."""

    tag: str
    attributes: dict[str, str]
    line: int
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    def find(self, tag: str) -> "Element | None":
        """The first child with this name."""
        return next((child for child in self.children if child.tag == tag), None)

    def find_all(self, tag: str) -> list["Element"]:
        """The children with this name."""
        return [child for child in self.children if child.tag == tag]

    def text_of(self, tag: str) -> str | None:
        """The text of the first child with this name, without spaces around it; None without."""
        child = self.find(tag)
        return None if child is None else child.text.strip()


def children_of_root(path: str, root: str) -> Iterator[Element]:
    """The children of the root of an XML file, each as soon as it is complete.

    Args:
        path: the file.
        root: the name that its root must have.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not complete XML, has another root or a document type; one line that
            names the file and the line.
    """
    builder = _Builder(path, root)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such annotation file: check the path")
    with open(path, "rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            builder.feed(chunk)
            yield from builder.done
            builder.done.clear()
            if not chunk:
                return


class _Builder:
    def __init__(self, path: str, root: str):
        self._path = path
        self._root = root
        self._open: list[Element] = []
        self.done: list[Element] = []
        parser = self._parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartDoctypeDeclHandler = self._reject

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.Parse(chunk, not chunk)
        except (expat.ExpatError, LookupError) as error:  # LookupError: an unknown encoding
            raise ValueError(
                f"{self._path}: not a complete XML file ({error}): write or download it again"
            ) from error

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._open and tag != self._root:
            raise ValueError(
                f"{self._path}: its root is <{tag}>, not <{self._root}>: check its layout"
            )
        self._open.append(Element(tag, attributes, self._parser.CurrentLineNumber))

    def _end(self, tag: str) -> None:
        element = self._open.pop()
        if len(self._open) == 1:
            self.done.append(element)
        elif self._open:
            self._open[-1].children.append(element)

    def _text(self, text: str) -> None:
        self._open[-1].text += text

    def _reject(self, *arguments: object) -> None:
        line = self._parser.CurrentLineNumber
        raise ValueError(f"{self._path}, line {line}: has a document type: remove <!DOCTYPE ...>")
