__version__ = "0.1.0"

import os as _os

# How long an OpenMP thread spins before it sleeps. The default (milliseconds) starves whoever shares the cores. An update of the 1M
# model, two cores of an AMD EPYC: 69.5 ms with 1,000 and 68.3 with 100,000 on an idle machine, 123 and 336 beside one busy process.
# Only counts before torch is imported.
if "OMP_WAIT_POLICY" not in _os.environ: _os.environ.setdefault("GOMP_SPINCOUNT", "1000")
