"""What says how much a unit would gain from a costlier candidate: one file per score, from cheap to exact."""

from .ablation import Ablation, AblationFromDense
from .attention_mass import AttentionMass
from .base import SCORES, Score, score_class
from .gate_gradient import GateGradient
from .head_output import HeadOutput
from .layer_output import LayerOutput
from .learned_gates import LearnedGates

__all__ = [
    "SCORES",
    "Ablation",
    "AblationFromDense",
    "AttentionMass",
    "GateGradient",
    "HeadOutput",
    "LayerOutput",
    "LearnedGates",
    "Score",
    "score_class",
]
