"""`python -m featcal_fast` is the command `featcal-fast`."""

from featcal_fast.cli import main

if __name__ == "__main__":
    main()
