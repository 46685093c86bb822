"""Docstrings refer to objects by Sphinx roles; the site shows the name that a role holds."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):`(~?)([^`]+)`")


def plain(match: re.Match[str]) -> str:
    """``:func:`~package.function` `` -> ``function`` in code style."""
    short, name = match.groups()
    return f"`{name.rpartition('.')[2] if short else name.lstrip('.')}`"


class Roles(Extension):
    """Replace the roles in every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(plain, obj.docstring.value)
