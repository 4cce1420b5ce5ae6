"""The journal's tests."""
