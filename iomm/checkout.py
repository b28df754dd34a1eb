"""The checkout that a script lies in. Imports nothing that a file beside the script could hide."""

import sys
from pathlib import Path

import iomm


def enter(script):
    """Return the root of the checkout that `script` lies in, first on sys.path if the script is what Python runs.

    Python puts the folder of a script first, where each file hides an installed module of its name; the root takes its
    place, so that `benchmarks` and `tests` can be imported. Exits with a sentence if `iomm` comes from another checkout:
    half of what the script measures would be that one's.
    """
    script = Path(script).resolve()
    root = next(
        (folder for folder in script.parents if (folder / "iomm" / "__init__.py").is_file()), None
    )
    if sys.path and Path(sys.path[0] or ".").resolve() == script.parent:
        here, there = root and (root / "iomm").resolve(), Path(iomm.__file__).resolve().parent
        if here != there:
            raise SystemExit(
                f"{script} is of {root}, but Python imports {there}: run `pip install -e .` in {root}, or set "
                f"PYTHONPATH={root}"
            )
        sys.path[0] = str(root)
    return root
