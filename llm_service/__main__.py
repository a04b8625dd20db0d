"""``python -m llm_service [MODEL] flags``"""

import sys

from opticnerve.cli import run

if __name__ == "__main__":
    sys.exit(run("llm_service.service", sys.argv[1:]))
