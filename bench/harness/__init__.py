"""What all benchmarks share.

`process` runs a command in a process of its own; `runs` checks every worker before it times any, and lets them take
turns; `results` keeps each finished run at once, with code, machine and versions, so that a run that was ended goes on;
`tests` runs tests apart; `tables` and `plots` show what was found.
"""
