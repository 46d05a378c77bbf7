"""What is on the disk -> uint8 pictures in a fixed order, with names and labels.

In comes what `--data` names: a folder, a list, an array, a packed or a published set. Out goes a
`Source`: a count, names, labels, and one decoded picture at a time.

    decode.py        the bytes of one picture -> uint8 RGB, or a reason why not
    names.py         paths of very many pictures in little memory
    sources.py       pictures in a fixed order, with names and labels
    named_sets.py    clipart, fashion-mnist, cifar10, cifar100, stl10
    shards.py        packed sets: tar shards with an index
    listing.py       which image files lie below a folder; a cache of it for large ones
    lists.py         list files and tables: paths with labels
    arrays.py        pictures in .npz and .npy files
    folders.py       which folders are splits and classes; what was taken, in words
    opening.py       what `--data` names -> a source
    quarantine.py    pictures that could not be read, and when they are too many
    fingerprints.py  hashes of the pictures that a run began with; what has changed since
    annotations.py   objects in pictures, from the folders of VOC and COCO
    pack.py          any source -> a packed set
"""
