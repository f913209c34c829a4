"""How one client, or a block of them, is trained: what simulation and real clients share."""
