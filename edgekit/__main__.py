"""`python -m edgekit`: the same as the command `edgekit`."""

import sys

from edgekit.cli.main import main

sys.exit(main())
