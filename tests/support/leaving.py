# SPDX-License-Identifier: Apache-2.0
"""Runs a script of ranks, and leaves without the interpreter's end.

A thread of gloo lets go of a call's tensors after the call, for which it takes the interpreter's
lock. If the interpreter ends just then, Python before 3.12 ends the thread, which C++ takes for a
failure: the process aborts, now and then, after all is done.

torchrun -m support.leaving script.py ...
"""

import os
import runpy
import sys


def leave() -> None:
    """Ends a rank that is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
