"""fedsim: a federated learning simulator and server."""

__version__ = "0.1.0"
