"""``python -m encoder_service [MODEL] flags``"""

import sys

from opticnerve.cli import run

if __name__ == "__main__":
    sys.exit(run("encoder_service.service", sys.argv[1:]))
