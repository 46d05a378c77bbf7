"""The pictures that an encoder is judged on, and their features.

In come a `Source` and a frozen encoder. Out go rows of features, split into a bank to learn from
and queries to judge on.

    extract.py      features of centre crops or of strong views
    projections.py  projections of a set too large for memory, kept on the disk
    split.py        which labelled pictures are learned from, and which are judged
    leaks.py        evaluation pictures that are in the pretraining set
"""
