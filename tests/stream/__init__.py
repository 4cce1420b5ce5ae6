"""The stream, on real clusters."""
