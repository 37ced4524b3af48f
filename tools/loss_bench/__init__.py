"""Parts of `tools/bench_loss.py`: what is computed (`cases`), by whom (`implementations`), at what `costs`.

The dense reference and the memory measure are those of the test suite, whose folder joins the path here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
