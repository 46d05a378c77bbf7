"""How good an encoder is: protocols that compare it with its random initialisation.

In come a run folder and labelled pictures. Out go records in results.json, classifiers that were
learned on the way, and tables of features and predictions.

    progress.py  how far a long protocol is
    features/    the pictures to judge on, and their features
    results/     records, tables, learned classifiers
    classify/    protocols of pictures with one class or several
    detect/      protocols of pictures with objects
    exam.py      one encoder and the pictures it is judged on, each opened once
    evaluate.py  all protocols asked for, for the random and the trained encoder
    predict.py   labels of new pictures, by a classifier that was learned
    embed.py     features of pictures as a Parquet table
"""
