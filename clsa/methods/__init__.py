"""Learning methods by name."""

from clsa.methods.clsa import CLSA
from clsa.methods.method import Method
from clsa.methods.moco import MoCo

METHODS: dict[str, type[Method]] = {"moco": MoCo, "clsa": CLSA}
