"""A run folder and its state on the disk.

In come options, the state of a training run, and what happens in it. Out go checkpoints that
survive a kill, the encoder, metrics and a progress bar; opening the
folder again restores all of it.

    computing.py      threads, precision, formats: decided when a run begins, and kept
    folder.py         the files of a run folder, and whether it is free or holds this run
    digests.py        one sha256 over nested tensors and numbers
    saved_encoder.py  the file of a trained encoder
    checkpoint.py     one atomic training state with a manifest; safe loading
    snapshots.py      a run's networks at the start and now
    alarms.py         texts of the warnings about a run's health
    journal.py        progress bar, metrics.jsonl, TensorBoard
    data_change.py    pictures that changed since a run began: refused, or accepted
    state.py          everything that changes during a run
    saver.py          when a run is saved, and what happens when the disk refuses
"""
