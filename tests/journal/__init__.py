"""The journal: processes that are killed, databases that forget, disks that are full, forks."""
