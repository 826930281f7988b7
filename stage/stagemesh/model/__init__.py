"""Model files: what is in them, and how layers and ranks divide them. Needs no torch."""
