"""`tracker-daemon serve`: one process that takes calls over HTTP for many workers and other languages."""
