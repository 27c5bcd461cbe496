"""From texts to batches: documents cut into pieces without loss, pieces packed or padded into rows, words masked."""

from .dataset import IGNORED, Samples
from .fit import check_apart, check_reach, first_position
from .masking import MaskedWords, MaskEpochs
from .packing import SHORT, check_short
from .samples import make_samples

__all__ = [
    "IGNORED",
    "SHORT",
    "MaskEpochs",
    "MaskedWords",
    "Samples",
    "check_apart",
    "check_reach",
    "check_short",
    "first_position",
    "make_samples",
]
