"""Measures how close the strong operations are to Pillow's, and how often they are applied.

    python -m benchmarks.parity

prints, for both pools, the share of pixels within 1/255 of Pillow (mean and worst draw) and the
share of exactly equal pixels, over 1,000 draws of each operation at 32 and 96 pixels; then the mean
number of operations per view over 10,000 views.
"""

import numpy as np

from clsa.options.run import StrongOptions, ViewOptions
from clsa.views import transform
from clsa.views.specs import strong_specs
from tests.support.reference_pillow import parity

NUM_DRAWS, NUM_VIEWS = 1_000, 10_000


def main() -> None:
    print("| pool | operation | size | within 1/255, mean | worst draw | equal |")
    print("|---|---|---|---|---|---|")
    for pool, ops in transform.POOLS.items():
        for op in ops:
            for size in (32, 96):
                result = parity(op, pool, NUM_DRAWS, size)
                shares = " | ".join(f"{share:.4%}" for share in result)
                print(f"| {pool} | {op} | {size} | {shares} |")

    print("\n| pool | operations a view | none applied | none but Identity |")
    print("|---|---|---|---|")
    for pool in ("paper", "official"):
        (spec,) = strong_specs(ViewOptions(), StrongOptions(pool=pool), first_view=2)
        params = transform.sample(spec, seed=0, epoch=0, index=np.arange(NUM_VIEWS))
        changing = params.applied & (np.array(transform.POOLS[pool])[params.ops] != "Identity")
        none_applied, none_changing = (~params.applied).all(1).mean(), (~changing).all(1).mean()
        mean = params.applied.sum(1).mean()
        print(f"| {pool} | {mean:.3f} | {none_applied:.4f} | {none_changing:.4f} |")
    print(f"| expected: paper | 2.5 | {0.5**5:.4f} | {0.5**5:.4f} |")
    print(f"| expected: official | 2.5 | {0.5**5:.4f} | {(0.5 + 0.5 / 14) ** 5:.4f} |")


if __name__ == "__main__":
    main()
