"""WHO: tokens, how they are made, and the threads that wear them.

`native` is the platform's twin (`posix` or `windows`), chosen here and nowhere else. This package knows nothing of jobs, lanes
or files to come.
"""

import sys

if sys.platform == "win32":
    from . import windows as native
else:
    from . import posix as native

__all__ = ["native"]
