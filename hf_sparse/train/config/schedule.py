"""How the pattern comes over the course of the training."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Section, check_least, check_share, option


@dataclass
class ScheduleArguments(Section):
    """From a wide window to the pattern alone."""

    narrow_from: int | None = option(
        None,
        "begin with a window of so many tokens beside the pattern, and halve it until the pattern is alone; default: "
        "the pattern alone from the first step (the dense control, which sees everything, has nothing to narrow)",
    )
    narrow_share: float = option(0.5, "share of the steps after which the pattern is alone")

    def __post_init__(self) -> None:
        if self.narrow_from is not None:
            check_least("narrow_from", self.narrow_from, 2)
        check_share("narrow_share", self.narrow_share)
        super().__post_init__()
