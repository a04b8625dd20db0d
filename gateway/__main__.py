"""``python -m gateway``"""

import sys

from opticnerve.cli import run

if __name__ == "__main__":
    sys.exit(run("gateway.service", sys.argv[1:]))
