"""`clsa protocols`."""

from clsa.cli.command import parse
from clsa.options.commands import ProtocolsOptions
from clsa.options.config import nearest, to_yaml
from clsa.options.protocols import CARDS
from clsa.system.errors import ClsaError

KINDS = {
    "classes": "Pictures of one class each (--data as for pretraining):",
    "voc": "VOC07's folders, several classes per picture (--data VOCdevkit):",
    "boxes": "Objects in VOC's or COCO's folders (--data VOCdevkit or COCO):",
}


def protocols(args: list[str]) -> None:
    """List the protocol cards that `evaluate` can use; with a NAME, all settings of that card."""
    name = parse(protocols, ProtocolsOptions, args).name
    if name and name not in CARDS:
        close = nearest(name, list(CARDS))
        hint = f"did you mean {close}?" if close else "see clsa protocols"
        raise ClsaError(f"protocol {name}", "no such card", hint)
    if name:
        card = CARDS[name]
        print(f"{name}: {card.about} [{card.source}]\nhash {card.hash(name)}\n")
        print(to_yaml(card.settings()), end="")
        return
    for kind, heading in KINDS.items():
        print(heading)
        for each, card in CARDS.items():
            if card.pictures == kind:
                star = "" if card.frozen else " *"
                print(f"  {each:19} {card.about} ({card.source}){star}")
    print("* changes a copy of the encoder too. clsa protocols NAME shows all settings of a card.")
