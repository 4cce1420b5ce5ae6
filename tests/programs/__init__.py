"""Programs that the tests run in processes of their own; each speaks in JSON lines on standard output."""
