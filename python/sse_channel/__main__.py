"""`python -m sse_channel publish CHANNEL JSON`, `python -m sse_channel tail CHANNEL`."""

import sys

from .commands import main

sys.exit(main())
