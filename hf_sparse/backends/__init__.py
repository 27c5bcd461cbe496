"""How attention is computed: `attend` runs one call on the backend that was chosen."""

from .call import Call, CallRecord, Recorder, recording
from .choose import BACKENDS, attend, check_backend

__all__ = ["BACKENDS", "Call", "CallRecord", "Recorder", "attend", "check_backend", "recording"]
