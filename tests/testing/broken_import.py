"""A policy whose module imports transformers. It stands alone, since the check looks at the whole module."""

import transformers

from tests.testing.honest import EveryOtherKey


class ImportsTransformers(EveryOtherKey):
    """Imports transformers with its module, so that every list of policies has to load it."""

    written_for = transformers.__name__
