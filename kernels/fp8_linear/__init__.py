"""A linear layer whose matrix products, forward and backward, take both operands in fp8 (arXiv 2209.05433).

Every side of a product is divided by one scale that puts its largest magnitude at the largest value of its format and is
then rounded: e4m3 (3 bits of mantissa) for inputs and weights, e5m2 (2 bits, a range as wide as float16's) for the gradient
that comes in. Scales are found anew in each call, so that there is no state. Sums are float32, results in x's dtype."""

from iomm.kernels.dispatch import pick, register
from iomm.kernels.fp8_linear.reference import fp8_linear_reference
from iomm.kernels.fp8_linear.scaled import DTYPES, MULTIPLE, fp8_linear_scaled, why_not

__all__ = ["MULTIPLE", "fp8_linear", "why_not"]

register("fp8_linear", "scaled_mm", fp8_linear_scaled, dtypes=DTYPES, why_not=why_not)
register("fp8_linear", "reference", fp8_linear_reference)


def fp8_linear(x, weight_OI, bias_O=None):
    """(..., I) -> (..., O) in x's dtype: x W^T + b, differentiable in all three. Values that are not finite make every
    result NaN. Raises ValueError on shapes or dtypes that do not fit."""
    if weight_OI.dim() != 2 or x.shape[-1] != weight_OI.shape[1] or (bias_O is not None and len(bias_O) != len(weight_OI)):
        raise ValueError(f"x must be (..., I), the weight (O, I) and the bias (O,), got {tuple(x.shape)}, "
                         f"{tuple(weight_OI.shape)} and {None if bias_O is None else tuple(bias_O.shape)}")
    if x.dtype != weight_OI.dtype or (bias_O is not None and bias_O.dtype != x.dtype):
        raise ValueError(f"x, weight and bias must share a dtype, got {x.dtype}, {weight_OI.dtype} and "
                         f"{None if bias_O is None else bias_O.dtype}")
    y_MO = pick("fp8_linear", x.device, x.dtype)(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    return y_MO.view(*x.shape[:-1], len(weight_OI))
