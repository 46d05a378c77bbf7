"""Pictures -> batches of crops, in an order that is a function of the seed and the step.

In come a `Source`, the views that a method wants, and a range of steps. Out go batches of uint8
crops on the device, the same whatever the number of workers.

    order.py       which pictures a step shows, and which stand in for unreadable ones
    crops.py       what a batch shows, and the crops of a picture for all views
    few_labels.py  which pictures count as labelled; labelled pictures added to each batch
    streaming.py   batches of sets that are read from the disk by worker processes
    loader.py      batches for training and for evaluation, from memory or from the disk
"""
