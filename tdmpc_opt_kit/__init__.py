__version__ = "0.1.0"

import os as _os

# How long an OpenMP thread spins before it sleeps. The default (milliseconds) starves whoever shares the cores: on two busy ones a
# product of 512 x 384 by 384 x 384 took 52 ms instead of 4. Not to spin at all costs a plan 150 to 170 ms on two idle cores, short
# spinning 106, long spinning 93; on two busy cores 396, 491 and 1,274. Only counts before torch is imported.
if "OMP_WAIT_POLICY" not in _os.environ: _os.environ.setdefault("GOMP_SPINCOUNT", "1000")
