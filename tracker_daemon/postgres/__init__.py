"""The Postgres adapter: a `Sink` over one set-based merge a transaction."""
