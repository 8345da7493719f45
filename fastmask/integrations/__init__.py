"""One file for each foreign library: explicit functions that patch a given object.

``fastmask.patch`` and ``fastmask.unpatch`` are the whole interface; ``fastmask.integrations.transformers`` adds the
image processors' post-processing. Foreign libraries are imported only once a model of theirs is handed in.
"""

from fastmask.integrations._patching import patch, unpatch

__all__ = ["patch", "unpatch"]
