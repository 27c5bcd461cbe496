"""Calibration: measure which layers and heads need the distance, give the rest a cheaper pattern."""

from .result import Calibration, Point
from .run import calibrate
from .save import save_calibration
from .scores import SCORES, Score
from .table import table

__all__ = ["SCORES", "Calibration", "Point", "Score", "calibrate", "save_calibration", "table"]
