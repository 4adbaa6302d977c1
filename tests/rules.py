"""Rules that tests ask for, because their peers speak NTLM on loopback without TLS."""

from typing import Final

from bits_async.auth.policy import AuthRules, Hosts

PEERS: Final = Hosts(("127.0.0.0/8", "::1", "localhost", ".test"))
NTLM_OVER_HTTP: Final = AuthRules(ntlm_over_http=PEERS)
