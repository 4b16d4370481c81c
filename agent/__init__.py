"""weir: decides which sockets a container may open and measures what it sends."""

__version__ = "0.1.0"
