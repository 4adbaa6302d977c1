"""PROVE IT: challenges read and answered, for the origin's 401 and the proxy's 407, without knowing a job, a file or a
connection.

`challenge` (text to values) and `policy` (who may see what) are pure; `schemes` answers; `tickets` keeps Kerberos tickets,
`renewal` renews them in time.
"""
