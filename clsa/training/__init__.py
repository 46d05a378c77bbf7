"""The step, the loop around it, and how a run starts and ends. Read `step.py` first.

In come the options of a run. Out goes a run folder with a trained encoder.

    bad_steps.py     steps whose loss or gradient is not finite, and when they end a run
    step.py          `train_step`: one step. Read this first
    health.py        what goes wrong in a run whose numbers are finite
    online_probe.py  accuracy after an epoch
    setup.py         what a run is made of, and where it stands
    fit.py           `fit`: the loop around the step
    start.py         a run from its options to its exit code
    replay.py        computes a bad step again
    extend.py        trains a run for more epochs
    exemplars.py     which pictures of a stage are kept
    forgetting.py    accuracy on every earlier stage
    stages.py        one run per stage; each continues from the one before
"""
