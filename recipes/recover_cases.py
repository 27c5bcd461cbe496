"""What `recover.py` trains: the recipes whose recovery is measured, and what was tried on the way to their defaults."""

from dataclasses import dataclass, field

SEEDS = (0, 1, 2)
LENGTH = 2048  # tokens, in training and in evaluation
CONTROL = "dense"  # the dense control: the same data, steps, seeds and LoRA
# Recipes of recipes/*.yaml: patterns of about an eighth of dense alone, then what is calibrated to a quarter, and
# evenly spaced dense layers beside it.
RECIPES = (
    "sliding_window",
    "streaming_llm",
    "longformer",
    "sparse_transformer_fixed",
    "bigbird",
    "strided",
    "sparse_transformer_strided",
    "calibrated",
    "layered",
)

# The fully sparse pattern of the density of `calibrated`, which its gap closed is a share of.
SAME_DENSITY = "sliding_window", {"window": 256}

GOALS = {  # gap closed that was asked for
    "sliding_window": 0.3,
    "streaming_llm": 0.3,
    "longformer": 0.3,
    "sparse_transformer_fixed": 0.5,
    "bigbird": 0.5,
    "strided": 0.5,
}


@dataclass(frozen=True)
class Trial:
    """One change of a recipe, trained once on the training files and scored on validation files, without a control.

    options: of the recipe, as on its command line.
    """

    name: str
    recipe: str
    options: dict[str, object] = field(default_factory=dict)


_SHORT = {"max_steps": 100}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _tried(recipe: str, **changes: dict[str, object]) -> tuple[Trial, ...]:
    """Return the recipe with half its steps, and the same with each change."""
    found = [Trial("the recipe, 100 steps", recipe, _SHORT)]
    return (
        *found,
        *(Trial(name.replace("_", " "), recipe, {**_SHORT, **own}) for name, own in changes.items()),
    )


TRIALS: tuple[Trial, ...] = (
    *_tried(
        "sliding_window",
        divergence_alone={"kl_weight": 1.0, "lm_weight": 0.0},
        cross_entropy_alone={"kl_weight": 0.0, "lm_weight": 1.0},
        and_attention_outputs={"attention_weight": 1.0},
        LoRA_on_the_attention_alone={"lora_targets": _ATTENTION},
        rank_8={"lora_r": 8, "lora_alpha": 16},
        without_the_norms={"train_norms": False},
        narrowing_from_2048={"narrow_from": 2048},
    ),
    *_tried(
        "streaming_llm",
        rank_128={"lora_r": 128, "lora_alpha": 256},
        without_the_norms={"train_norms": False},
        with_the_embeddings={"train_embeddings": True},
    ),
)
