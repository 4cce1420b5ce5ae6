"""What is under deploy/: checked by the tools that it is for, built and run without a Docker engine."""
