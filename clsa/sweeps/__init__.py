"""Grids of runs with seeds, and their table.

In comes a YAML file or a preset that says which options vary. Out go one run folder a cell and one
table with means and deviations.

    grid.py   which runs a grid holds
    table.py  the results: mean and deviation over the seeds
    sweep.py  running them, one after the other
"""
