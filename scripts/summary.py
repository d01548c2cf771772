"""A run as a small table: `python scripts/summary.py runs/quickstart`."""

import json
import sys
from pathlib import Path


def main(run_folder: Path) -> None:
    log = run_folder / "metrics.jsonl"
    if not log.is_file():
        print(f"error: {log} does not exist; needed: the folder of a run", file=sys.stderr)
        sys.exit(2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    trained = [line for line in lines if "perf/step_s" in line]
    steps = trained[-1]["step"]
    before = [0] + [line["step"] for line in trained[:-1]]
    seconds = sum(line["perf/step_s"] * (line["step"] - start) for line, start in zip(trained, before))
    rows = {"steps": f"{steps:,}", "seconds of training": f"{seconds:,.0f}"}
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
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
