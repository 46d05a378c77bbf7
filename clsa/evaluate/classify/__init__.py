"""Protocols of pictures with one class, or with several (VOC07).

In come features, or an encoder and pictures. Out go accuracies or average precision.

    knn.py                nearest neighbours
    logistic.py           logistic regression
    linear.py             the linear probe of the papers
    linear_fast.py        the same in seconds, on features extracted once
    finetune.py           all layers learn
    average_precision.py  average precision by both conventions of VOC
    voc07.py              VOC07, several classes a picture
    voc07_released.py     what CLSA's released code computes on VOC07
    svm.py                support vector machines: VOC07 and few shots
"""
