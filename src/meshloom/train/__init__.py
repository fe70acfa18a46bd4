"""Train: data, the loop that repeats the step, what it reports, and the run folder it leaves."""
