"""Commands that train, and what belongs to training.

In come pictures and options. Out goes a run folder.

    next_steps.py  what to do with a finished run
    pretrain.py    clsa pretrain
    extend.py      clsa extend
    demo.py        clsa demo
    sweep.py       clsa sweep
    recipes.py     clsa recipes
    replay.py      clsa replay
    digest.py      clsa digest
"""
