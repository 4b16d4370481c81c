"""Destinations that tests and the demo speak to: all of them are answered by the peer side of a World.

Addresses are textual. The Google ones lie inside policies/sets/google (142.250.0.0/15, 2a00:1450::/32, …), as the test
of the sets shows; the Gmail ones stand for what smtp, pop and imap.gmail.com resolve to.
"""

from __future__ import annotations

PUBLIC = "93.184.216.34"
PUBLIC6 = "2606:2800:220:1::1"

GOOGLE = "142.250.0.1"
GOOGLE6 = "2a00:1450:4001:81b::200e"
GMAIL_SMTP = "142.250.27.108"
GMAIL_POP = "142.250.27.109"
GMAIL_IMAP = "142.250.27.110"
GOOGLE_DNS = ("8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844")

PRIVATE = ("10.1.2.3", "172.16.5.5", "192.168.7.7", "100.64.1.1")
PRIVATE6 = "fd00:1::1"
METADATA = "169.254.169.254"
LINK_LOCAL6 = "fe80::1"

# IPv6 addresses that carry an IPv4 address: how translators and tunnels write 10.1.2.3 (RFC 6052, 3056, 4291 2.5.5.1).
NAT64_PRIVATE = "64:ff9b::10.1.2.3"
SIX_TO_FOUR_PRIVATE = "2002:a01:203::1"
COMPATIBLE_PRIVATE = "::10.1.2.3"
