"""Find the checkout of a script. Imports nothing that a file in the script's folder could hide."""

import sys
from pathlib import Path

import iomm


def enter(script: str) -> Path | None:
    """Return the root of the checkout that contains `script`, and put it on sys.path.

    Python puts a script's folder first on sys.path, where each file hides an installed module of
    the same name. If `script` is what Python runs, the root replaces that entry, so `benchmarks`
    and `tests` can be imported. Exits with one sentence if `iomm` comes from another checkout,
    because the script would then measure that checkout.
    """
    path = Path(script).resolve()
    root = next(
        (folder for folder in path.parents if (folder / "iomm" / "__init__.py").is_file()), None
    )
    if sys.path and Path(sys.path[0] or ".").resolve() == path.parent:
        here, there = root and (root / "iomm").resolve(), Path(iomm.__file__).resolve().parent
        if here != there:
            raise SystemExit(
                f"{script} belongs to {root}, but Python imports {there}. "
                f"Run `pip install -e .` in {root}, or set PYTHONPATH={root}"
            )
        sys.path[0] = str(root)
    return root
