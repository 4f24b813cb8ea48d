"""Pictures with captions: one loader for every source, tensors for training, and a tokenizer."""

from minivlp.data.errors import DataError, DataWarning
from minivlp.data.pairs import Batches, CaptionBatches, PairTensors, load_pairs, load_picture, to_tensors
from minivlp.data.patches import PatchCodes, hide_blocks
from minivlp.data.text import Tokenizer, TokenTable, mask_words

__all__ = [
    "Batches",
    "CaptionBatches",
    "DataError",
    "DataWarning",
    "PairTensors",
    "PatchCodes",
    "TokenTable",
    "Tokenizer",
    "hide_blocks",
    "load_pairs",
    "load_picture",
    "mask_words",
    "to_tensors",
]
