"""One device: executes step plans.

Imported before torch, whose OpenMP reads its settings when it is loaded: at the end of a kernel a thread waits for the
others by spinning, by default for milliseconds. On a core that somebody else needs too, it then spins in the way of the
very thread it waits for. A short spin covers the usual wait; after it the thread sleeps. This concerns torch's own
operators: the C++ extension has threads of its own (csrc/pool.h). See docs/performance-log.md.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
