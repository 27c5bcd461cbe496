"""How attention is computed: `attend` runs one call on the backend that was chosen."""

from .call import Call, CallRecord, Inputs, Recorder, recording
from .choose import BACKENDS, Choice, attend, check_backend, preview

__all__ = [
    "BACKENDS",
    "Call",
    "CallRecord",
    "Choice",
    "Inputs",
    "Recorder",
    "attend",
    "check_backend",
    "preview",
    "recording",
]
