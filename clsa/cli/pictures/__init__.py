"""Commands about pictures.

In come paths of pictures. Out go sets that are quicker to read, or made for a test.

    pack.py    clsa pack
    scenes.py  clsa scenes
"""
