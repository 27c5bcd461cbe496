"""hf_sparse: sparse attention patterns for pretrained Hugging Face models."""

from .analyze import analyze  # the function: it stands where the subpackage of its name would
from .backends import recording
from .calibrate import calibrate  # likewise
from .evaluate.encode import encode
from .hf import (
    describe,
    extend_positions,
    hold_mass,
    load,
    load_adapter,
    load_pattern,
    make_cache,
    monitored,
    patch_model,
    patched,
    save_adapter,
    save_pattern,
    unpatch_model,
)
from .hf.recommend import recommended
from .patterns import (
    Pattern,
    PerHead,
    PerLayer,
    Union,
    available_patterns,
    get_pattern,
    load_plugin,
    register_pattern,
)
from .patterns.atrous import Atrous
from .patterns.atrous_local import AtrousLocal
from .patterns.bigbird import BigBird
from .patterns.block_local import BlockLocal
from .patterns.dilated_window import DilatedWindow
from .patterns.full import Full
from .patterns.global_tokens import GlobalTokens
from .patterns.grouped_heads import GroupedHeads
from .patterns.layered import Layered
from .patterns.longformer import Longformer
from .patterns.multi_scale import MultiScale
from .patterns.random import Random
from .patterns.rerope import ReRoPE
from .patterns.self_extend import SelfExtend
from .patterns.shifted import Shifted
from .patterns.sinks import Sinks
from .patterns.sliding_window import SlidingWindow
from .patterns.sparse_transformer_fixed import SparseTransformerFixed
from .patterns.sparse_transformer_strided import SparseTransformerStrided
from .patterns.streaming_llm import StreamingLLM
from .patterns.strided import Strided
from .selectors.esa import EssentialSparseAttention
from .selectors.gsa import GatherScatterAttention
from .selectors.gsa_on_device import GsaOnDevice
from .selectors.kvstar import KVStar
from .selectors.quest import Quest
from .selectors.threshold import Threshold
from .selectors.topk_blocks import TopKBlocks

__version__ = "0.1.0"

__all__ = [
    "Atrous",
    "AtrousLocal",
    "BigBird",
    "BlockLocal",
    "DilatedWindow",
    "EssentialSparseAttention",
    "Full",
    "GatherScatterAttention",
    "GlobalTokens",
    "GroupedHeads",
    "GsaOnDevice",
    "KVStar",
    "Layered",
    "Longformer",
    "MultiScale",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Quest",
    "Random",
    "ReRoPE",
    "SelfExtend",
    "Shifted",
    "Sinks",
    "SlidingWindow",
    "SparseTransformerFixed",
    "SparseTransformerStrided",
    "StreamingLLM",
    "Strided",
    "Threshold",
    "TopKBlocks",
    "Union",
    "analyze",
    "available_patterns",
    "calibrate",
    "describe",
    "encode",
    "extend_positions",
    "get_pattern",
    "hold_mass",
    "load",
    "load_adapter",
    "load_pattern",
    "load_plugin",
    "make_cache",
    "monitored",
    "patch_model",
    "patched",
    "recommended",
    "recording",
    "register_pattern",
    "save_adapter",
    "save_pattern",
    "unpatch_model",
]
