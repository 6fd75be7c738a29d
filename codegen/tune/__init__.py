"""Search over the schedules of kernel families, and the records of what it found."""
