"""A run as a small table: `python scripts/summary.py runs/quickstart`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from system import cli
from training.curves import read_log


def main(run_folder: Path) -> None:
    trained = [values for values in read_log(run_folder) if "perf/step_s" in values]
    rows = {"steps": f"{trained[-1]['step']:,}", "seconds of training": f"{trained[-1]['seconds']:,.0f}"}
    rows["images/s (median)"] = f"{sorted(line['perf/img_per_s'] for line in trained)[len(trained) // 2]:,.0f}"
    for path in sorted((run_folder / "eval").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime)[-1:]:
        score = json.loads(path.read_text())
        rows |= {"fd_mnist": f"{score['fd_mnist']:.2f}", "class accuracy": f"{score['class_accuracy']:.3f}"}
        rows |= {"samples scored": f"{score['n']:,}", "network calls an image": str(score["network_calls"])}
    width = max(map(len, rows))
    print("\n".join(f"  {name:<{width}}  {value:>10}" for name, value in rows.items()))
    for grid in sorted((run_folder / "samples").glob("*/grid.png"), key=lambda p: p.stat().st_mtime)[-1:]:
        print(f"  samples: {grid}")


if __name__ == "__main__":
    with cli.user_errors():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
