"""Several processes, a GPU each, at one job: who does what, and what they say to each other."""
