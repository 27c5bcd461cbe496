"""``python -m hf_sparse.cli`` is ``hf-sparse``."""

import sys

from . import main

sys.exit(main())
