"""The specification of unpatch."""


def unpatch_reference(tokens_BNK, height, width, patch):
    """(B, C, H, W) as `unpatch` describes it."""
    num_samples = tokens_BNK.shape[0]
    channels = tokens_BNK.shape[2] // patch**2
    tokens = tokens_BNK.view(num_samples, height // patch, width // patch, channels, patch, patch)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(num_samples, channels, height, width)
