"""Find the checkout that contains a script.

This module imports nothing that a file in the script's folder could hide.
"""

import sys
from pathlib import Path

import iomm


def enter(script: Path | str) -> Path | None:
    """Return the root of the checkout that contains `script`, or None if there is none.

    Python puts the folder of the script it runs first on sys.path, where each file hides the
    installed module of the same name. If Python runs `script`, the root replaces that folder, which
    also makes `benchmarks` and `tests` importable.

    Raises:
        SystemExit: if Python runs `script` and `iomm` comes from another checkout. Part of what the
            script measures would then be that checkout's code.
    """
    script = Path(script).resolve()
    root = next(
        (folder for folder in script.parents if (folder / "iomm" / "__init__.py").is_file()), None
    )
    if sys.path and Path(sys.path[0] or ".").resolve() == script.parent:
        expected, imported = (
            root and (root / "iomm").resolve(),
            Path(iomm.__file__).resolve().parent,
        )
        if expected != imported:
            raise SystemExit(
                f"{script} belongs to {root}, but Python imports {imported}. "
                f"Run `pip install -e .` in {root}, or set PYTHONPATH={root}."
            )
        sys.path[0] = str(root)
    return root
