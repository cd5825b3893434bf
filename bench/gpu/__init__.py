"""Everything that only a GPU can show, by one command within a budget of minutes: `python -m bench.gpu --help`.

`__main__` goes through the sections in order of worth; `sections` runs a section's rows; `results` keeps them.
"""
