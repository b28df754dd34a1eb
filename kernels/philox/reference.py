"""The specification of the random numbers, in PyTorch int64 arithmetic."""

import math

import torch

WORD = 0xFFFFFFFF


def philox_words(seed, stream, n_B, num_blocks):
    """(B, num_blocks, 4) int64 that hold the 32-bit words of blocks 0 .. num_blocks - 1."""
    # A product of two words wraps at 2^64 and may turn negative; its halves are right after masking.
    block = torch.arange(num_blocks, device=n_B.device).expand(len(n_B), num_blocks)
    n = n_B[:, None].expand_as(block)
    c0, c1, c2, c3 = block, torch.full_like(block, stream), n & WORD, (n >> 32) & WORD
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def normal_from_words(words):
    """Box-Muller over the last axis (a, b, a, b), in float64, rounded to float32."""
    a, turn = words[..., 0::2] >> 8, words[..., 1::2] >> 8
    radius = torch.sqrt(-2 * torch.log((a + 1).double() * 2.0**-24))
    quarter = (turn + 2**21) >> 22
    angle = (turn - (quarter << 22)).double() * (2 * math.pi * 2.0**-24)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    odd_quarter = quarter % 2 == 1
    c, s = torch.where(odd_quarter, sine, cosine), torch.where(odd_quarter, cosine, sine)
    c, s = torch.where((quarter + 1) & 2 == 2, -c, c), torch.where(quarter & 2 == 2, -s, s)
    return torch.stack((radius * c, radius * s), dim=-1).flatten(-2).float()


def philox_reference(distribution, seed, stream, n_B, count):
    """(B, count) float32 of `distribution` "uniform" or "normal"; seed as a signed or unsigned 64-bit int."""
    words = philox_words(seed, stream, n_B, -(-count // 4))
    values = (words >> 8).float() * 2.0**-24 if distribution == "uniform" else normal_from_words(words)
    return values.flatten(1)[:, :count].contiguous()
