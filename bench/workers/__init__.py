"""What `bench.compare` runs, each in a process of its own: `python -m bench.workers.NAME FOLDER OUT ...`.

`FOLDER` holds a workload: `base`, `merged`, a folder an expert, `<task>.safetensors`, `recipe.json`. A worker writes
the calibrated weights to `OUT` and prints `{"seconds": ..., "peak_gib": ...}` as its last line.
"""
