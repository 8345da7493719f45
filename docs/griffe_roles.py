"""Sphinx roles in docstrings, such as :func:`fastmask.mask_cost`, as links of mkdocstrings."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
LINK = r'<autoref optional identifier="\1"><code>\1</code></autoref>'


class Roles(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(LINK, obj.docstring.value)
