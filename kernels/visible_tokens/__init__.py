"""Which image tokens the model sees: a mask drawn per sample, as packed indices.

`visible_tokens` is the only place where the mask of METHOD's step 4 is drawn.
"""

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.philox import checked_seed
from iomm.kernels.visible_tokens.compiled import visible_tokens_compiled
from iomm.kernels.visible_tokens.reference import visible_tokens_reference

register("visible_tokens", "cpp", visible_tokens_compiled, devices=("cpu",), why_not=lambda: native.why_not("cpu"))
register("visible_tokens", "cuda", visible_tokens_compiled, devices=("cuda",), why_not=lambda: native.why_not("cuda"))
register("visible_tokens", "reference", visible_tokens_reference)


def visible_tokens(seed, n_B, num_tokens, ratio, count="bernoulli"):
    """(index_V, offsets, position_V): the visible of P = `num_tokens` tokens per sample, packed, in ascending order.

    n_B (B,) int64: the samples' numbers; the result lives on its device. ratio in [0, 1]: the share that is hidden.
    count "bernoulli": token i is hidden where uniform(seed, MASK, n)[i] < ratio. "fixed": exactly
    round((1 - ratio) * P) stay (half to even), those with the largest uniforms (of equal ones the lower index).

    index_V int64 points into the flattened (B * P) tokens, position_V int64 in [0, P) is the place within the image,
    and sample b owns offsets[b] .. offsets[b + 1] of both (offsets int32, (B + 1,)). V depends on the draw, so on a
    GPU the host waits for it. Raises ValueError on bad input."""
    seed = checked_seed(seed, n_B)
    if not 1 <= num_tokens < 2**31 or len(n_B) * num_tokens >= 2**31:
        raise ValueError(f"num_tokens must be at least 1, and B times it below 2^31, got {num_tokens} and B {len(n_B)}")
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be between 0 and 1, got {ratio}")
    if count not in ("bernoulli", "fixed"):
        raise ValueError(f"count must be bernoulli or fixed, got {count!r}")
    run = pick("visible_tokens", n_B.device)
    return run(seed, n_B.contiguous(), num_tokens, float(ratio), count == "fixed")
