"""What a job will need, before anything runs, and what to change where that is too much."""
