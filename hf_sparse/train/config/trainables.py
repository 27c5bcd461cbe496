"""Which weights are trained."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Section, check_filled, check_least, option


@dataclass
class TrainableArguments(Section):
    """LoRA, and what is trained in full beside it."""

    lora_r: int = option(16, "rank of the LoRA matrices")
    lora_alpha: int = option(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "share of the LoRA inputs dropped in training")
    lora_targets: list[str] | None = option(
        None, "names of the linear layers LoRA is added to, or all-linear; default: those of the attention"
    )
    use_rslora: bool = option(False, "scale updates by lora_alpha / sqrt(lora_r) instead (arXiv:2312.03732)")
    use_dora: bool = option(False, "train magnitudes and directions apart (DoRA, arXiv:2402.09353)")
    train_norms: bool = option(True, "train the normalisation layers as well, in full")
    train_embeddings: bool = option(
        False, "train the token embeddings, and with them a head that is tied to them, in full"
    )

    def __post_init__(self) -> None:
        check_least("lora_r", self.lora_r, 1)
        check_least("lora_alpha", self.lora_alpha, 1)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}; 0 is a good start.")
        check_filled("lora_targets", self.lora_targets)
        super().__post_init__()
