"""``python -m gateway``"""

import sys

from opticnerve.cli.commands import run

if __name__ == "__main__":
    sys.exit(run("gateway.service", sys.argv[1:]))
