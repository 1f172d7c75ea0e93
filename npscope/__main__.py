"""``python -m npscope`` is the command ``npscope``."""

import sys

from npscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
