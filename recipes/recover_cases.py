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

GOAL_OF_THE_WINDOW = 0.97  # of the gap of SAME_DENSITY, asked for of `calibrated`
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
TRIALS = (
    Trial("the recipe, 100 steps", "sliding_window", _SHORT),
    Trial("divergence alone", "sliding_window", {**_SHORT, "kl_weight": 1.0, "lm_weight": 0.0}),
    Trial("cross entropy alone", "sliding_window", {**_SHORT, "kl_weight": 0.0, "lm_weight": 1.0}),
    Trial("and attention outputs", "sliding_window", {**_SHORT, "attention_weight": 1.0}),
)
