"""What the scripts share, in wings that import one way: training, scoring, generation, data, modeling, launch, and
below them config.py, prompting.py and files.py.
"""
