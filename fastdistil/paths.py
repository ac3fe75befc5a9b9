"""How a model, a folder of data or a file is named."""

import os


def one_spelling(source: str) -> str:
    """Of what is here, the one spelling that "~/a", "b/../a" and "a/" have; of a name on the hub, the name.

    What was made is found again by how its source is spelled.
    """
    path = os.path.expanduser(source)
    normal = os.path.normpath(path)
    # Behind a link, ".." may lead elsewhere.
    same = os.path.exists(normal) and os.path.exists(path) and os.path.samefile(path, normal)
    return normal if same else path
