"""What an evaluation found.

In come predictions and true labels. Out go accuracies, records of results.json, tables, and linear
classifiers as files.

    records.py  accuracies, records of results.json, their table
    heads.py    linear classifiers that evaluation learned, as files
"""
