"""The journal: what is accepted and not yet applied, in files that survive the death of the process."""
