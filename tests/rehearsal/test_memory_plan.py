"""The memory that engine/dry_run.py plans, against the peak of a rehearsed step at full size.

A published config runs on the pretended device (full_size.py). The plan is the one that the same
run logs when it starts.
"""

import pytest
from test_rehearsal import FULL_SIZE_LIMIT_S, pytestmark, rehearse, reports_of

__all__ = ["pytestmark"]

SETTINGS = {
    "as published": (),
    "recompute": ("train.recompute=10",),
    # More than there are.
    "every block recomputes": ("train.recompute=99",),
    "overlap": ("train.overlap=true",),
    "recompute, overlap": ("train.recompute=10", "train.overlap=true"),
    "routing": ("route.ratio=0.5",),
}
# Compiling takes minutes. The larger configs differ in the generator only.
LARGE = ("as published", "every block recomputes")
CASES = [
    (f"full-{size}{compiled}", settings)
    for size in ("b", "l", "xl")
    for compiled in ("", "-compiled")
    for settings in (SETTINGS if size == "b" else LARGE)
]


@pytest.mark.slow
@pytest.mark.parametrize("case, settings", CASES)
def test_plan_is_within_5_percent_of_the_peak(case, settings, tmp_path):
    if case.endswith("-compiled"):
        pytest.importorskip("triton")
    rehearsed = rehearse(tmp_path, case, *SETTINGS[settings], limit_s=FULL_SIZE_LIMIT_S)
    [report] = reports_of(rehearsed, case)
    seen = report["full_size"]
    assert sum(seen["plan"].values()) == pytest.approx(seen["peak"], rel=0.05), seen["plan"]
    # Everything but activations. The rest is the batch itself.
    static = sum(
        number
        for part, number in seen["plan"].items()
        if not part.startswith(("activations", "encoders", "prefetched"))
    )
    assert static == pytest.approx(seen["static"], rel=0.01)
