"""What a run has learned, in numbers and figures.

In come a run folder and its pictures. Out go numbers, tables and figures: positives, negatives,
classes, spread, and which distortions break retrieval.

    measures.py         numbers about positives, negatives, classes and spread
    operations.py       which strong operation makes a picture unrecognisable
    figures.py          numbers -> PNG (matplotlib)
    inputs.py           the networks and pictures that all parts share
    parts.py            the parts of a diagnosis
    diagnose.py         all parts, as numbers, table and figures
    neighbour_sheet.py  pictures beside their neighbours (CLIM)
"""
