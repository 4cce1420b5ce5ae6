"""`python -m tracker_daemon`: the same as `tracker-daemon`."""

from tracker_daemon.cli import main

if __name__ == "__main__":
    main()
