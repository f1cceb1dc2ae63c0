"""The paper's questions, asked of the drawn world: plain runs of fomo.py, and README.md's tables.

    python study/study.py               all runs that runs.jsonl lacks, as many at a time as cores
    python study/study.py a b           those of two questions; --jobs 1 for one at a time
    python study/study.py --list a      the commands alone
    python study/study.py --tables      writes the tables of study/README.md, and methods.png

A run lies in runs/study/ and goes on where it was stopped; when it is finished, its row is appended
to study/runs.jsonl: scores in percent as [KA, ZS, GM], theta_0's first, then after each task.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
import data
import evaluate
import fomo

ROWS = HERE / "runs.jsonl"
SEEDS = range(3)
SMALL = " --weights runs/theta_0-small/model.safetensors"  # made as theta_0.safetensors, see README
MIXTURES = ("0.33/0.34/0.33", "0.5/0.5/0", "0.05/0.48/0.47", "0/0.1/0.9", "0.8/0.1/0.1")
META = {"cosine": ("none", "autoregressive", "dynamic"),
        "rsqrt": ("none", "autoregressive", "continued", "recovered")}
CELLS = {"latest / latest": "finetune", "ema / ema": "merge", "zero-shot / ema": "zs-merge",
         "zero-shot / all": "offline-merge"}  # of TIME's grid, that are methods
SPREAD = {4: 0.59, 8: 0.77, 16: 0.88, 32: 0.94}  # T -> w, w^T being the share of theta_0 at the end


def grid(methods, values):
    """Every method with every value, {name: options}, as {name of a table's line: options}."""
    return {f"{m}, {name}": f"--method {m} {options}"
            for m in methods for name, options in values.items()}


# question -> (what is asked, {line of the table: options})
QUESTIONS = {
    "a": ("method", {m: f"--method {m}" for m in ("joint", *fomo.RUNS) if m not in (
        "ema-merge", "offline-merge", "zero-shot")}),
    "b": ("mixture P/D/B, finetune", {m: f"--method finetune --mixture {m}" for m in MIXTURES}),
    "c": ("schedule and meta-schedule, finetune", {
        f"{s}, {m}": f"--method finetune --schedule {s} --meta {m}"
        for s, metas in META.items() for m in metas}),
    "d": ("order", grid(("finetune", "merge"), {how: f"--order {how}" for how in (
        "random", "dataset", "frequency", "performance", "similarity")})),
    "e-tasks": ("number of tasks T, the same budget", {
        f"{m}, T {t}": f"--method {m} --tasks {t}" + f" --merge-weight {w}" * (m == "merge")
        for m in ("finetune", "merge") for t, w in SPREAD.items()}),
    "e-budget": ("compute", grid(("joint", "finetune", "merge"), {
        f"{x} x": f"--budget {4000 * x:g}" for x in (0.25, 0.5, 1, 2)})),
    "f-grid": ("a task starts from / deployed is", {
        f"{a} / {b}": f"--method {CELLS[f'{a} / {b}']}" if f"{a} / {b}" in CELLS else
        f"--method finetune --merge-init {a} --merge-deploy {b}"
        for a in fomo.merge.SOURCES for b in fomo.merge.SOURCES[1:]}),
    "f-weight": ("w of the old weights", grid(("merge", "ft-merge", "wise-ft"), {
        f"w {w}": f"--merge-weight {w}" for w in (0.1, 0.3, 0.5, 0.7, 0.9)})),
    "f-technique": ("technique, running merge to running merge", {
        t: f"--method merge --merge-technique {t}" for t in fomo.merge.TECHNIQUES}),
    "g": ("size of the model", {
        f"{size}, {m}": f"--method {m}" + SMALL * (size == "small")
        for size in ("tiny", "small") for m in ("joint", "finetune", "merge", "wise-ft")}),
}
USUAL = ("--mixture 0.33/0.34/0.33", "--schedule cosine", "--meta none", "--order random",
         "--tasks 8", "--budget 4000", "--merge-weight 0.77", "--merge-technique linear")


def plain(options):
    """Options without those that are the default, so that a run serves several questions."""
    for usual in USUAL:
        options = re.sub(rf" {re.escape(usual)}(?= |$)", "", options)
    return options.replace("wise-ft --merge-weight 0.5", "wise-ft")  # its default


def command(options, seed):
    """-> the plain command of a run, and its folder."""
    words = re.sub("--method |--|runs/", "", options).replace("/", "-").replace(" ", "_")
    out = HERE.parent / "runs" / "study" / f"{words}-{seed}"
    return f"python fomo.py {options} --seed {seed} --workers 0 --out {shlex.quote(str(out))}", out


def run(options, seed):
    """Does a run that is not done, and appends its row."""
    data.toy = functools.cache(data.toy)  # drawn once a process
    words, out = command(options, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not (out / "results.json").exists():
        log = open(f"{out}.txt", "a")  # noqa: SIM115
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            status = fomo.main(shlex.split(words)[2:])
        if status:
            return f"failed, see {out}.txt: {words}"
    results = evaluate.read_results(out)
    rows = [results["theta_0"], *results["tasks"]]
    row = {
        "options": options, "seed": seed,
        "scores": [[round(r[metric], 3) for metric in evaluate.METRICS] for r in rows],
        "datasets": {name: round(v, 2) for name, v in results["final"]["datasets"].items()},
        "steps": results["steps_per_task"], "trained": results["trained_parameters"],
        "seconds": round(results["seconds"]), "theta_0": results["theta_0_sha256"][:8],
        "torch": fomo.version("torch"),
    }
    with open(ROWS, "a") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
    return f"{options} --seed {seed}: {rows[-1]['ka']:.1f} {rows[-1]['zs']:.1f}"


def read_rows():
    """{(options, seed): row}."""
    rows = map(json.loads, ROWS.read_text().splitlines() if ROWS.exists() else ())
    return {(row["options"], row["seed"]): row for row in rows}


def number(values, form="{:.1f}"):
    """mean ± std of a sample, without the std of one."""
    return form.format(mean(values)) + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def line(name, rows, joint):
    """A line of a table: the runs of one setting, that differ in their seed."""
    theta_0 = rows[0]["scores"][0]
    ka, zs, gm = zip(*(row["scores"][-1] for row in rows))
    tasks = len(rows[0]["scores"]) - 1
    above = first = ""
    if tasks > 1:
        moves = [mean(row["scores"][1][i] - theta_0[i] for row in rows) for i in (0, 1)]
        first = "{:+.1f}, {:+.1f}".format(*moves)
        goal = [mean(row["scores"][-1][i] for row in joint) for i in (1, 0)]
        points = zip(zs, ka)
        above = number([evaluate.above_line(p, theta_0[1::-1], goal) for p in points], "{:+.1f}")
    return [name, number(ka), number(zs), number(gm), above, first,
            f"{tasks} x {rows[0]['steps']:,}", f"{rows[0]['trained']:,}", str(len(rows))]


def table(question, rows):
    """The lines of a question that have been run, as markdown."""
    what, lines = QUESTIONS[question]
    cells = [[what, "KA", "ZS", "GM", "above line", "first update", "steps", "trained", "n"]]
    for name, options in lines.items():
        size = SMALL * ("small" in options)
        joint = [rows[key] for key in rows if key[0] == f"--method joint{size}"]
        mine = [rows[plain(options), seed] for seed in SEEDS if (plain(options), seed) in rows]
        if mine:
            theta_0 = [f"{score:.1f}" for score in mine[0]["scores"][0]]
            theta_0 = [("small, " if size else "") + "theta_0", *theta_0, *[""] * 5]
            cells += [theta_0] * (theta_0 not in cells) + [line(name, mine, joint)]
    return evaluate.aligned(cells, "markdown")


def write_tables(rows):
    """study/README.md with the tables between its marks made anew, and README's picture."""
    readme = HERE / "README.md"
    marks = re.compile(r"(<!-- table (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
    readme.write_text(marks.sub(lambda m: f"{m[1]}\n{table(m[2], rows)}\n<!-- end -->",
                                readme.read_text()))
    tracks = {}
    for name in ("joint", "finetune", "merge", "ft-merge", "wise-ft", "lora", "locked-image"):
        mine = [row["scores"] for key, row in rows.items() if key[0] == f"--method {name}"]
        tracks[name] = [[(zs, ka) for ka, zs, _ in scores] for scores in mine]
    evaluate.plot(tracks, HERE / "methods.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(QUESTIONS)}; default all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--tables", action="store_true", help="write the tables")
    args = parser.parse_args()
    asked = tuple(args.questions) or ""  # "e" asks for e-tasks and e-budget
    lines = [lines for name, (_, lines) in QUESTIONS.items() if name.startswith(asked)]
    wanted = dict.fromkeys((plain(options), seed) for several in lines for seed in SEEDS
                           for options in several.values())
    rows = read_rows()
    if args.tables:
        write_tables(rows)
    elif args.list:
        print("\n".join(command(*one)[0] for one in wanted))
    else:
        left = [one for one in wanted if one not in rows]
        print(f"{len(wanted)} runs, {len(left)} to do, {args.jobs} at a time", flush=True)
        with ProcessPoolExecutor(args.jobs) as pool:
            for sentence in pool.map(run, *zip(*left)):
                print(sentence, flush=True)


if __name__ == "__main__":
    main()
