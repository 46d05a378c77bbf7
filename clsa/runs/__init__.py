"""A run folder and its state on the disk.

In come options, the state of a training run, and what happens in it. Out go checkpoints that
survive a kill, the encoder, metrics and a progress bar; a folder that is opened again gives all of
it back.

    folder.py         the files of a run folder, and whether it is free or holds this run
    digests.py        one sha256 over nested tensors and numbers
    saved_encoder.py  the file of a trained encoder
    checkpoint.py     one atomic training state with a manifest; safe loading
    snapshots.py      a run's networks as it began and as they are
    alarms.py         what a run warns of, in plain words
    journal.py        progress bar, metrics.jsonl, TensorBoard
    data_change.py    pictures that changed since a run began: refused, or accepted
    state.py          everything that changes during a run
    saver.py          when a run is saved, and what happens when the disk refuses
"""
