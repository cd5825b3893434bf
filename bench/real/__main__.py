"""`python -m bench.real`; the processes that it starts import what they run from `command`."""

from bench.real.command import main

if __name__ == "__main__":
    main()
