"""Which tests run on Windows: those whose subject is the same there, and this directory's own.

Tests in them that need POSIX carry a marker, and are listed as left out. The others are left to the system they are about: they
drive children by signals, network namespaces, ids of users.
"""

from typing import Final

WHERE: Final = [
    "tests/windows",
    "tests/test_errors.py",
    "tests/test_limits.py",
    "tests/identity/test_windows.py",
    "tests/identity/test_wts.py",
]
