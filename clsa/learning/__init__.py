"""The parts that learning methods are built from.

In come views, queries and keys. Out go features, projections, losses and optimiser steps.

    memory_format.py    channels_last where torch computes soundly in it, else the plain format
    precision.py        where bf16 is wrong on a CPU: layers in float32, a test of the machine
    models.py           encoders (timm), projector, momentum copy, batch norm in groups
    norm_statistics.py  a copy of batch norm's running statistics, to undo a bad step
    bank.py             key queue, memory rows, prototypes, learned negatives
    losses.py           losses over a bank: info_nce, distribution_divergence ...
    pair_losses.py      losses between the rows of a batch: nt_xent, suncet ...
    mixture_loss.py     the contrastive loss of mixed pictures (CLIM)
    assignments.py      losses between assignments to prototypes (SwAV, DINO)
    clustering.py       k-means and nearest neighbours of a whole set (PCL, CLIM)
    neighbours.py       which picture is a positive of which (CLIM)
    optim.py            SGD, LARS, AdamW, and schedules as functions of the step
"""
