"""`python -m promedical` is the `promedical` command."""

import sys

from promedical.cli import main

if __name__ == "__main__":
    sys.exit(main())
