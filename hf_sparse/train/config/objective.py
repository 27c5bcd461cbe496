"""What the training minimises."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Section, check_least, check_share, check_weight, option


@dataclass
class ObjectiveArguments(Section):
    """The weights of the parts of the loss, each a mean in nats per token but for the last."""

    kl_weight: float = option(
        1.0,
        "of the divergence from the same model run dense and without its adapter: distillation, which costs one more "
        "forward pass and no second model",
    )
    lm_weight: float = option(
        0.0, "of the cross-entropy of the text (of masked tokens in an encoder), as in ordinary training"
    )
    attention_weight: float = option(
        0.0,
        "of the squared distance of each attention layer's output from the dense model's, relative to its square, "
        "mean over the layers (arXiv:2410.10254); keeps the outputs of all layers twice; a share of each batch of its "
        "own, so that it depends a little on how a step is divided into batches",
    )
    mask_share: float = option(0.15, "encoders: share of the tokens that are masked and predicted")
    head_chunk: int = option(1024, "positions whose logits are held at a time")

    def __post_init__(self) -> None:
        for name in ("kl_weight", "lm_weight", "attention_weight"):
            check_weight(name, getattr(self, name))
        if not (self.kl_weight or self.lm_weight or self.attention_weight):
            raise ValueError(
                "kl_weight, lm_weight and attention_weight are all 0: nothing would be learnt; give one."
            )
        check_share("mask_share", self.mask_share)
        check_least("head_chunk", self.head_chunk, 1)
        super().__post_init__()
