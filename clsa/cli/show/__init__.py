"""Commands that show what there is to choose from.

In comes nothing, or a name. Out go lists, and all that a name stands for.

    recipes.py    clsa recipes
    protocols.py  clsa protocols
"""
