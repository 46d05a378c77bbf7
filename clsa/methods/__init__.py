"""Learning methods by name, and how options become one.

In come the options of a run and how much there is to learn from. Out goes a `Method`: `forward`
computes losses and changes nothing, `after_step` moves key weights and banks.

    method.py      what a method is: the abstract class, what goes in and comes out
    moco.py        MoCo v1 and v2, one weak query or several
    simclr.py      SimCLR
    byol.py        BYOL
    simsiam.py     SimSiam
    swav.py        SwAV
    adco.py        AdCo
    instdisc.py    InstDisc
    pirl.py        PIRL
    pcl.py         PCL
    moco_v3.py     MoCo v3
    dino.py        DINO
    supervised.py  cross-entropy with labels, the reference
    wrappers/      methods that wrap another method
"""

from clsa.methods.adco import AdCo
from clsa.methods.byol import BYOL
from clsa.methods.dino import DINO
from clsa.methods.instdisc import InstDisc
from clsa.methods.method import Extent, Method
from clsa.methods.moco import MoCo
from clsa.methods.moco_v3 import MoCoV3
from clsa.methods.pcl import PCL
from clsa.methods.pirl import PIRL
from clsa.methods.simclr import SimCLR
from clsa.methods.simsiam import SimSiam
from clsa.methods.supervised import Supervised
from clsa.methods.swav import SwAV
from clsa.methods.wrappers.clim import CLIM
from clsa.methods.wrappers.continual import Continual
from clsa.methods.wrappers.stronger import Stronger
from clsa.methods.wrappers.suncet import SuNCEt
from clsa.options.run import RunOptions

METHODS: dict[str, type[Method]] = {
    "moco": MoCo,
    "simclr": SimCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "swav": SwAV,
    "adco": AdCo,
    "instdisc": InstDisc,
    "pirl": PIRL,
    "pcl": PCL,
    "moco-v3": MoCoV3,
    "dino": DINO,
    "supervised": Supervised,
}


def build_method(options: RunOptions, extent: Extent) -> Method:
    """The method that `options` name, inside the wrappers they ask for; `Stronger` is outermost."""
    method = METHODS[options.method.name](options, extent)
    if options.clim:
        method = CLIM(method, options, extent)
    if options.labels is not None:
        method = SuNCEt(method, options, extent)
    if options.stages and options.continual.keep == "distill":
        method = Continual(method, options, extent)
    return Stronger(method, options, extent) if options.stronger else method
