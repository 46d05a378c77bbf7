"""Commands that train, and what belongs to training.

In come pictures and options, or a run to continue. Out goes a run folder, or a report on a bad
step.

    next_steps.py  what to do with a finished run
    pretrain.py    clsa pretrain
    extend.py      clsa extend
    demo.py        clsa demo
    sweep.py       clsa sweep
    replay.py      clsa replay
"""
