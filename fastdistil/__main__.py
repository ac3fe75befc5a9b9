"""`python -m fastdistil`, for launchers such as `accelerate launch -m fastdistil train ...`."""

import sys

from fastdistil.cli import main

sys.exit(main())
