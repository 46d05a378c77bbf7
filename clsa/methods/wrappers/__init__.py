"""What is put around a learning method, and is itself one.

In comes a method. Out goes a method that does the same and something more. `Stronger` is always the
outermost.

    wrapper.py    all that a wrapper does not define is the inner method's
    clim.py       CLIM: mixtures with neighbours, several resolutions
    suncet.py     SuNCEt: a few labels
    continual.py  continual pretraining
    stronger.py   CLSA's divergence around any method
"""
