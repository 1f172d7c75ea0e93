"""The command ``npscope``: parse, call the library, report, and an exit code.

One module a command: its arguments, and the job that is run with their values. Signals and failures,
those of the parser too, are met in one place (`npscope.cli.running`). What computes is imported by the
jobs: ``npscope --help`` is quick.

Exit codes: 0 done; 1 a check failed; 2 wrong use or bad input; 3 input/output or resources;
128 + n ended by signal n (130 is Ctrl-C, 141 a closed pipe).
"""

from npscope.cli.app import main
from npscope.cli.running import Stopped

__all__ = ["Stopped", "main"]
