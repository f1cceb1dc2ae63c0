"""The paper's questions, asked of the drawn world: plain runs of fomo.py, and README's tables.

    python study/study.py               all runs that runs.jsonl lacks, as many at a time as cores
    python study/study.py a b           those of two questions; --jobs 1 for one at a time
    python study/study.py --list a      the commands alone
    python study/study.py --tables      writes README.md's tables from runs.jsonl

A run lies in mine/study/ and goes on where it was stopped; when it is finished, its row is appended
to study/runs.jsonl: scores in percent as [KA, ZS, GM], theta_0's first, then after each task.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import evaluate

ROWS = HERE / "runs.jsonl"
README = HERE.parent / "README.md"
ALWAYS = "--threads 1 --workers 0 --cache mine/cache"

METHODS = {
    "joint": "--method joint",
    "finetune": "--method finetune",
    "merge (ema-merge)": "--method merge",
    "ft-merge": "--method ft-merge",
    "zs-merge": "--method zs-merge",
    **{m: f"--method {m}" for m in ("locked-text", "locked-image", "lnfit", "bitfit", "lora",
                                    "dora", "vera", "galore", "ewc", "si")},
}  # fmt: skip
MIXTURES = ("0.33/0.34/0.33", "0.5/0.5/0", "0.05/0.48/0.47", "0/0.1/0.9", "0.8/0.1/0.1")
SCHEDULES = {
    "cosine": "",
    "cosine, autoregressive": " --meta autoregressive",
    "cosine, dynamic": " --meta dynamic",
    "rsqrt": " --schedule rsqrt",
    "rsqrt, autoregressive": " --schedule rsqrt --meta autoregressive",
    "rsqrt, continued": " --schedule rsqrt --meta continued",
    "rsqrt, recovered": " --schedule rsqrt --meta recovered",
}
STARTS = ("zero-shot", "latest", "ema", "all")
DEPLOYED = ("latest", "ema", "all")
KNOWN = {  # cells of TIME's grid that have a name: their runs are those of question a
    ("latest", "latest"): "--method finetune",
    ("ema", "ema"): "--method merge",
    ("zero-shot", "ema"): "--method zs-merge",
}
TECHNIQUES = ("slerp", "task-arithmetic", "ties", "dare", "breadcrumbs", "magmax", "model-stock",
              "random")  # fmt: skip
SPREAD_OVER = {5: 0.66, 10: 0.81, 20: 0.9, 40: 0.95}  # tasks -> merge weight, .9 ** (20 / tasks)


def place(start, deployed):
    named = KNOWN.get((start, deployed))
    return named or f"--method finetune --merge-init {start} --merge-deploy {deployed}"


def option(text, name, value, usual):
    """`text` with one more option, unless its value is the usual one."""
    return text if value == usual else f"{text} {name} {value}"


# question -> (what is asked, {line of the table: options}, seeds, most important question first)
QUESTIONS = {
    "a": ("methods", METHODS, 3),
    "b": ("mixtures P/D/B, finetuning", {
        m: option("--method finetune", "--mixture", m, MIXTURES[0]) for m in MIXTURES}, 3),
    "c": ("schedules and meta-schedules, finetuning", {
        name: f"--method finetune{options}" for name, options in SCHEDULES.items()}, 3),
    "f-grid": ("where an update starts / what is deployed", {
        f"{start} / {deployed}": place(start, deployed)
        for start in STARTS for deployed in DEPLOYED}, 3),
    "f-weight": ("the weight of the old model", {
        f"{method}, w {w}": option(f"--method {method}", "--merge-weight", w, 0.77)
        for method in ("merge", "ft-merge", "zs-merge") for w in (0.67, 0.77, 0.88)}, 3),
    "f-technique": ("techniques, from the running merge to the running merge", {
        "linear": "--method merge",
        **{t: f"--method merge --merge-technique {t}" for t in TECHNIQUES},
        "task-arithmetic, scale .1":
        "--method merge --merge-technique task-arithmetic --merge-scale 0.1"}, 3),
    "e-tasks": ("number of updates T, the same total budget", {
        f"{method}, T {tasks}": f"--method {method} --tasks {tasks}" +
        (f" --merge-weight {w}" if method == "merge" else "")
        for method in ("finetune", "merge", "lora") for tasks, w in SPREAD_OVER.items()}, 3),
    "e-budget": ("compute", {
        f"{method}, {share} x": option(f"--method {method}", "--budget", round(3000 * share), 3000)
        for method in ("joint", "finetune", "merge", "lora")
        for share in (0.25, 0.5, 1, 1.5, 2, 4)}, 3),
    "d": ("order of the concepts", {
        f"{method}, {how}{', reversed' * back}":
        option(f"--method {method}", "--order", how, "random") + " --reverse" * back
        for method in ("finetune", "merge") for how in ("random", "dataset", "frequency")
        for back in (False, True)}, 3),
    "g": ("size of the model", {
        f"{size}, {method}": f"--method {method}" + " --model small" * (size == "small")
        for size in ("tiny", "small") for method in ("joint", "finetune", "merge", "lora")}, 3),
    "i": ("step of the task", {"finetune": "--method finetune --eval-every 12"}, 3),
}  # fmt: skip


# ------------------------------------------------------------------------------------ the runs


def runs(questions):
    """(options, seed) of each run once, in the order in which they are wanted."""
    wanted = [(options, seed) for q in questions for seed in range(QUESTIONS[q][2])
              for options in QUESTIONS[q][1].values()]  # fmt: skip
    return list(dict.fromkeys(wanted))


def folder(options, seed):
    words = options.removeprefix("--method ").replace("--", "").replace("/", "-")
    return f"mine/study/{words.replace(' ', '_')}-{seed}"


def command(options, seed):
    return f"python fomo.py {ALWAYS} {options} --seed {seed} --out {folder(options, seed)}"


def run(options, seed):
    """Does a run that is not done, and appends its row."""
    log = HERE.parent / f"{folder(options, seed)}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *shlex.split(command(options, seed))[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as out:
        status = subprocess.call(words, cwd=HERE.parent, env=environment, stdout=out, stderr=out)
    if status:
        return f"failed, see {log}: {command(options, seed)}"
    results = json.loads((HERE.parent / folder(options, seed) / "results.json").read_text())
    with open(ROWS, "a") as file:
        file.write(json.dumps(row(options, seed, results), separators=(",", ":")) + "\n")
    return f"{options} --seed {seed}: {results['final']['ka']:.1f} {results['final']['zs']:.1f}"


def row(options, seed, results):
    """A run's results.json in one line."""
    def scores(rows):
        return [[round(r[metric], 3) for metric in ("ka", "zs", "gm")] for r in rows]
    config = json.loads((HERE.parent / folder(options, seed) / "config.json").read_text())
    versions = {k: config["run"]["inputs"][k] for k in ("python", "torch", "numpy", "pillow")}
    return {
        "options": options,
        "seed": seed,
        "scores": scores([results["theta_0"], *results["tasks"]]),
        **within_tasks(results),
        "datasets": {name: round(v, 2) for name, v in results["final"]["datasets"].items()},
        "steps": results["steps_per_task"],
        "trained": results["trained_parameters"],
        "seconds": round(results["seconds"]),
        "theta_0": results["theta_0_sha256"][:8],
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
    }


def within_tasks(results):
    """{"within": for each task [[step, KA, ZS], ...]}, of a run with --eval-every."""
    rows = [[[r["step"], round(r["ka"], 3), round(r["zs"], 3)] for r in task["within"]]
            for task in results["tasks"] if "within" in task]  # fmt: skip
    return {"within": rows} if rows else {}


# ---------------------------------------------------------------------------------- the tables


def read_rows():
    """{(options, seed): row}; of a run that is there twice, the first."""
    found = {}
    for line in ROWS.read_text().splitlines() if ROWS.exists() else ():
        one = json.loads(line)
        found.setdefault((one["options"], one["seed"]), one)
    return found


def number(values, form="{:.1f}"):
    """mean ± std of a sample, without the std of one."""
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def line(name, found, joint):
    """A line of a table: the runs of one setting, that differ in their seed."""
    theta_0 = found[0]["scores"][0]
    ka, zs, gm = zip(*(r["scores"][-1] for r in found))
    tasks = len(found[0]["scores"]) - 1
    told = [name, number(ka), number(zs), number(gm), "", ""]
    if tasks > 1 and joint:
        ends = [(z, k) for k, z, *_ in (theta_0, joint)]
        above = [evaluate.above_line(point, *ends) for point in zip(zs, ka)]
        told[4] = number(above, "{:+.1f}")
    if tasks > 1:
        first = [mean(r["scores"][1][i] - theta_0[i] for r in found) for i in (0, 1)]
        told[5] = "{:+.1f}, {:+.1f}".format(*first)
    steps = f"{tasks} x {found[0]['steps']:,}"
    return [*told, steps, f"{found[0]['trained']:,}", str(len(found))]


def table(question, rows):
    """The lines of a question that have been run, as markdown."""
    if question == "i":
        return within_table(rows)
    what, lines, seeds = QUESTIONS[question]
    told = []
    for name, options in lines.items():
        found = [rows[options, seed] for seed in range(seeds) if (options, seed) in rows]
        if found:
            size = " --model small" * ("--model small" in options)
            joint = [r["scores"][-1] for (o, _), r in rows.items() if o == f"--method joint{size}"]
            theta_0 = [f"{score:.1f}" for score in found[0]["scores"][0]]
            first = ["small, theta_0" if size else "theta_0", *theta_0, *[""] * 5]
            if first not in told:
                told.append(first)
            told.append(line(name, found, [mean(values) for values in zip(*joint)]))
    head = [what, "KA", "ZS", "GM", "above the line", "first update KA, ZS", "steps", "trained",
            "n"]  # fmt: skip
    told.insert(0, head)
    left_out = {"trained"} if question not in ("a", "g") else set()
    if question == "e-budget":  # whose lines would each need a joint run of their own
        left_out.add("above the line")
    kept = [i for i, title in enumerate(head) if title not in left_out]
    return evaluate.aligned([[cells[i] for i in kept] for cells in told], "markdown")


def within_table(rows):
    """KA / ZS of what is trained within the first three tasks, the mean over the seeds."""
    found = [rows["--method finetune --eval-every 12", seed] for seed in range(3)
             if ("--method finetune --eval-every 12", seed) in rows]  # fmt: skip
    told = [["step of the task", "task 1", "task 2", "task 3"]]
    for i, (step, _, _) in enumerate(found[0]["within"][0] if found else ()):
        pairs = [[mean(r["within"][task][i][k] for r in found) for k in (1, 2)]
                 for task in range(3)]  # fmt: skip
        told.append([str(step), *("{:.1f} / {:.1f}".format(*pair) for pair in pairs)])
    if found:
        ends = [[mean(r["scores"][task][k] for r in found) for k in (0, 1)] for task in range(4)]
        told.append([f"{found[0]['steps']}, the end",
                     *("{:.1f} / {:.1f}".format(*pair) for pair in ends[1:])])  # fmt: skip
        told.insert(1, ["0", *("{:.1f} / {:.1f}".format(*pair) for pair in ends[:3])])
    return evaluate.aligned(told, "markdown")


def with_tables(text, rows):
    """README's text with the tables between its marks made anew."""
    def renewed(found):
        return f"{found[1]}\n{table(found[2], rows)}\n<!-- end -->"
    return re.sub(r"(<!-- table (\S+) -->)\n.*?<!-- end -->", renewed, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(QUESTIONS)}; default all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--tables", action="store_true", help="write README.md's tables")
    args = parser.parse_args()
    wanted = runs(args.questions or QUESTIONS)
    rows = read_rows()
    if args.tables:
        README.write_text(with_tables(README.read_text(), rows))
    elif args.list:
        print("\n".join(command(*one) for one in wanted))
    else:
        left = [one for one in wanted if one not in rows]
        print(f"{len(wanted)} runs, {len(left)} to do, {args.jobs} at a time", flush=True)
        with ThreadPoolExecutor(args.jobs) as crew:
            for said in crew.map(lambda one: run(*one), left):
                print(said, flush=True)


if __name__ == "__main__":
    main()
