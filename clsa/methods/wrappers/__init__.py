"""Methods that wrap another method and add something to it.

In comes a method. Out goes a method that does the same and something more. `Stronger` is always the
outermost.

    wrapper.py    base class: passes on to the inner method what a wrapper does not define
    clim.py       CLIM: mixtures with neighbours, several resolutions
    suncet.py     SuNCEt: a few labels
    continual.py  continual pretraining
    stronger.py   CLSA's divergence around any method
"""
