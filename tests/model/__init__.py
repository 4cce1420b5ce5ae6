"""The tracker against a model: a state machine over the real backlog and flusher, and one over the real Postgres sink."""
