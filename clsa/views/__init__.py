"""Random draws from a counter, and the pixel operations that they decide.

In come uint8 crops and a `ViewSpec` for each view that a method wants. Out go normalised float
views on the device.

    rng.py            uniform numbers as a hash of (seed, epoch, index, view, slot)
    geometry.py       crop, flip, shear, translate, rotate, jigsaw
    color.py          jitter, grayscale, blur, and the pixel operations of strong views
    specs.py          which views of a picture a step needs
    transform.py      what is drawn for a view, and the pixels that result
    mixing.py         two pictures mixed into one (CLIM)
    contact_sheet.py  pictures in a grid, to look at
"""
