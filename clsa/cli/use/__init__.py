"""Commands that judge, look into and use a run.

In comes a run folder. Out go tables, figures, features, predictions, or weights for another
library.

    evaluate.py   clsa evaluate
    predict.py    clsa predict
    diagnose.py   clsa diagnose
    embed.py      clsa embed
    preview.py    clsa preview
    export.py     clsa export
    digest.py     clsa digest
"""
