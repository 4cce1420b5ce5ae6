"""Tools that make things fail on purpose: a proxy that fails the Nth message between a client and Postgres."""
