"""Probes: questions whose answer is known, at known places of texts of exact lengths, dense and sparse."""

from .base import DepthProbe, Probe, Sample, Told
from .copying import Copy
from .figures import as_json, probe_csv
from .material import Material
from .needle import Needle
from .needle_multikey import NeedleMultikey
from .passkey import Passkey
from .plot import probe_pictures
from .registry import PROBES, probe_class
from .report import save_probes
from .result import ProbeResult, ProbeRun
from .run import probe
from .table import probe_table
from .variables import Variables

__all__ = [
    "PROBES",
    "Copy",
    "DepthProbe",
    "Material",
    "Needle",
    "NeedleMultikey",
    "Passkey",
    "Probe",
    "ProbeResult",
    "ProbeRun",
    "Sample",
    "Told",
    "Variables",
    "as_json",
    "probe",
    "probe_class",
    "probe_csv",
    "probe_pictures",
    "probe_table",
    "save_probes",
]
