"""Makes the demo's modules importable by their own names, as they are when its scripts run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
