"""``python -m opticnerve`` is the ``opticnerve`` command."""

import sys

from opticnerve.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
