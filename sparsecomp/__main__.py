"""``python -m sparsecomp``: the command line, for where the ``sparsecomp`` script is not on the path."""

import sys

from sparsecomp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
