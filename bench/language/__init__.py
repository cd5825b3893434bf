"""Accuracy on language: a byte-level Llama on four kinds of text, a small T5 on four text-to-text tasks.

python -m bench.language llama              # minutes on one core; writes bench/results/accuracy-llama.json
python -m bench.language t5                 # likewise, accuracy-t5.json
python -m bench.language llama --choose     # compares settings on the validation part; writes settings-llama.json
"""
