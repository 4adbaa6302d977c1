"""Which tests run on Windows: those whose subject is the same there, and this directory's own.

Tests in them that need POSIX carry a marker, and are listed as left out. Other files of tests are not run there: most drive signals,
network namespaces, modes and ids of users, or look into /proc.
"""

from typing import Final

WHERE: Final = [
    "tests/windows",
    "tests/test_errors.py",
    "tests/test_limits.py",
    "tests/auth/test_challenge.py",
    "tests/auth/test_policy.py",
    "tests/auth/test_rules.py",
    "tests/auth/test_schemes.py",
    "tests/identity/test_ambient.py",
    "tests/identity/test_threads.py",
    "tests/identity/test_tokens.py",
    "tests/identity/test_windows.py",
    "tests/identity/test_wts.py",
    "tests/jobs/test_model.py",
    "tests/jobs/test_notify.py",
    "tests/jobs/test_policies.py",
    "tests/jobs/test_scheduler.py",
    "tests/jobs/test_store.py::TestSqliteStore",
    "tests/transport/test_answers.py",
    "tests/transport/test_digests.py",
    "tests/transport/test_options.py",
    "tests/transport/test_proxies.py",
    "tests/transport/test_ranges.py",
    "tests/transport/test_timeouts.py",
]
