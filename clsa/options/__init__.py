"""Everything that a user may set, typed, with its default and its help. Needs no torch.

In come YAML files, keyword arguments and flags. Out go frozen objects that have been checked:
unknown names, wrong types and values out of range are refused here.

    config.py           base class of all options: YAML in and out, the nearest name for a typo
    methods.py          options of the learning methods, a class each
    wrappers.py         options of the wrappers: --stronger, --clim, --labels, --stages
    run.py              all options of a run
    cards.py            protocol cards: each way of judging, as data
    detection_cards.py  the cards of detection
    protocols.py        all cards by name, and how a user changes one
    commands.py         options of the other commands
"""
