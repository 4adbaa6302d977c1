"""FETCH: what to ask a server for, how to judge what it answers, and the connections both travel on.

Knows no job and no local file. `ranges`, `answers`, `proxies` and `timeouts` are pure; the rest opens connections.
"""
