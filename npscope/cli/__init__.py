"""The command ``npscope``: parse, call the library, report, and an exit code.

One module a command. Commands only parse; each returns the job to run, so that signals and failures
are met in one place (`npscope.cli.running`) and not inside the parser. What computes is imported by
the jobs: ``npscope --help`` is quick.

Exit codes: 0 done; 1 a check failed; 2 wrong use or bad input; 3 input/output or resources;
128 + n ended by signal n (130 is Ctrl-C, 141 a closed pipe).
"""

from npscope.cli.app import main
from npscope.cli.running import Stopped

__all__ = ["Stopped", "main"]
