"""Write the generated parts of the READMEs: python benchmarks/report.py [--check]

    benchmarks/README.md   tables of benchmarks/results/*.json in sections; one function a kind of result file picks the figures
    engine/README.md       every config key with its type, default and meaning, from the dataclasses and their comments
    kernels/README.md      every op with its backends in the order of preference, from their registrations

With --check nothing is written; the exit code is 1 if a part is out of date.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from iomm.checkout import enter

ROOT = enter(__file__)

from iomm.config import InputError

START, END = "<!-- generated: {} (python benchmarks/report.py) -->", "<!-- /generated -->"
# Section of benchmarks/README.md -> the kinds of result file that it shows.
SECTIONS = {
    "speed": ("throughput", "precision", "ops", "loader", "sampling", "startup"),
    "reliability": ("survival", "data-reliability", "checkpoint"),
    "learning": ("demo", "alignment", "recipes", "time-to-quality"),
}


def label(kind, settings):
    """What result files of a run with these settings are called."""
    return "-".join([kind, *(setting.replace("=", "-").replace("/", "-") for setting in settings)])


def above_0(kind):
    """An argparse type: numbers of this kind above 0, and below infinity."""

    def read(text):
        try:
            if 0 < (number := kind(text)) < float("inf"):
                return number
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(
            f"must be a {'whole ' * (kind is int)}number above 0, got {text}"
        )

    return read


def command(main):
    """Exit code of a script: a mistake of who runs it is one line, and 2."""
    try:
        return main()
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2


def pyplot():
    """Matplotlib's pyplot, to draw into files; where it is missing None, and one line says so."""
    try:
        import matplotlib
    except ImportError:
        print("no PNG: matplotlib is missing (pip install matplotlib)")
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def demo(result):
    one, two = result["pretrain"], result["finetune"]
    given = "".join(f" {setting}" for setting in result.get("settings", ()))
    for name, found in (
        (f"default run{given}, stage 1", one),
        (f"default run{given}, stage 2", two),
    ):
        yield (
            f"{name}: {found['steps']} steps of {found['global_batch']} images, {found['precision']}",
            f"{found['command_s']:.0f} s in all, {found['training_s']:.0f} s of it training, {found['images_per_s']:.0f} images/s, loss "
            f"{found['first_loss']:.2f} -> {found['last_loss']:.2f}",
        )
    for way, shown in (("image", "masked images"), ("text", "captions")):
        yield (
            f"samples from {shown} that are right, after stage 1 and after stage 2",
            "; ".join(
                f"{words} {one[key][way]:.0%} and {two[key][way]:.0%}"
                for key, words in (
                    ("fits", "whole caption"),
                    ("number", "number of shapes"),
                    ("colours", "number and colours"),
                )
            ),
        )


def loader(result):
    if "gpu_images_per_s" in result:
        yield (
            "decoding on the GPU, photographs to 512 px",
            f"{result['gpu_images_per_s']:.0f} images/s; at 80 images/s matrix products "
            f"take {result['gpu_time_taken_at_80_images_per_s']:.1%} longer",
        )
        return
    low, high = result["ours_wall_ratio_range"]
    yield (
        "loader on two cores, photographs to 512 px, against Pillow and torch's DataLoader",
        f"{result['ours_wall_ratio']:.2f} x the images/s ({low:.2f} to {high:.2f}), {result['ours_cpu_ratio']:.2f} x less CPU time per image",
    )
    yield (
        "index of 10 M samples",
        f"{result['index_mb_at_10m']:.0f} MB, first batch after {result['first_batch_s_at_10m']:.1f} s",
    )
    yield (
        "reading 100 images/s from tars",
        f"{result['reader_core_share_at_100_images_per_s']:.1%} of one core",
    )


def data_reliability(result):
    mutations, flips, tars = (
        result["mutations"],
        result["bit_flips_in_entropy_data"],
        result["tars"],
    )
    images, captions, once = result["images"], result["captions"], result["exactly_once"]
    yield (
        "D1: malformed images get the right verdict",
        f"{images['cases']} images (truncated, huge, animated, CMYK ...): "
        f"{images['with_the_wanted_verdict']} accepted or rejected for the expected reason",
    )
    yield (
        "D2: unknown damage is safe",
        f"{mutations['mutations']:,} randomly damaged images: no crash, no image accepted that the "
        f"decoder refuses, slowest {mutations['slowest_s'] * 1e3:.0f} ms",
    )
    yield (
        "D3: silent pixel damage is caught",
        f"{flips['trials']:,} single-bit flips: {flips['caught_by_the_checksum']:,} caught by the checksum",
    )
    yield (
        "D4: damaged tars lose nothing silently",
        f"{tars['cases']} damaged tars: "
        f"{tars['good_and_reported_samples_as_wanted']} yield and report the samples that they should",
    )
    yield (
        "D5: every sample exactly once per epoch",
        f"{once['samples']:,} samples in {once['shards']} shards, {once['bad']} of them bad, "
        f"{once['kills']} kills: {once['missing']} missing, {once['twice']} repeated",
    )
    yield (
        "D6: index and decoder agree on the size",
        f"{result['planner_is_decoder']['cases']} images in all EXIF orientations: "
        f"{result['planner_is_decoder']['same_size']} with the same size in both",
    )
    yield (
        "D8: malformed captions get the right verdict",
        f"{captions['cases']} captions: {captions['with_the_wanted_verdict']} as expected",
    )


def ops(result):
    for row in result["rows"]:
        if row.get("speedups", {}).get("reference"):
            yield (
                f"op `{row['op']}` ({row['case']}), backend {row['body']}",
                f"{row['ms']:.2f} ms, {row['speedups']['reference']:.1f} x the PyTorch reference",
            )


def checkpoint(result):
    yield (
        f"saving {result['parameters'] / 1e6:.1f} M parameters with moments and EMA, {result['bytes'] / 2**20:.0f} MiB",
        f"training waits {result['stall_s'] * 1e3:.0f} ms, the checkpoint is committed after {result['commit_s']:.2f} s and verified in "
        f"{result['verify_s']:.2f} s",
    )


def precision(result):
    fp8 = result["runs"]["fp8"]
    yield (
        f"fp8 against bf16, loss after {result['steps']} steps",
        f"{fp8['last_loss']:.4f}, {result['fp8_over_bf16']:+.2%} (another seed: "
        f"{result['seed_over_bf16']:+.2%}); images/s x {result['speedup']:.2f}",
    )


def sampling(result):
    for row in result["rows"]:
        passes = f"{row['steps']} steps" + (" x 2 (guidance)" if row["guidance"] != 1 else "")
        yield (
            f"sampling from text, {row['size_px'][1]} x {row['size_px'][0]} px, generator of {row['parameters'] / 1e6:.0f} M, {passes}, batch "
            f"{row['batch']}, {row['dtype']}{', compiled' if row['compiled'] else ''}",
            f"{row['images_per_s']:.3g} images/s, generator at {row['generator_tflops']:.3g} TFLOP/s",
        )


def throughput(result):
    rows, batch = result["rows"], result["images_a_step"]
    ours, bare = (
        rows["ours"],
        (
            "run.dir",
            "train.",
            "data.max_bad_fraction",
            "data.shards=",
            "data.heldout=",
            "evaluate.",
            "precision",
        ),
    )
    whose = f"`{' '.join([result['config'], *(c for c in result['changed'] if not c.startswith(bare))])}`, {result['precision']}"
    mfu = f", mfu {result['mfu']:.1%}" if result["mfu"] else ""
    yield (
        f"training step, {whose}, {batch} images",
        f"{ours['s'] * 1e3:.0f} ms, {ours['images_per_s']:.2f} images/s, {result['of_matmul_rate']:.0%} of this machine's matmul rate{mfu}, "
        f"peak memory {result['peak_memory_gib']:.1f} GiB",
    )
    if "split_s" in result:
        total = sum(result["split_s"].values())
        parts = sorted(result["split_s"].items(), key=lambda pair: -pair[1])
        yield (
            f"share of each part of that step, {whose}",
            ", ".join(f"{part} {s / total:.0%}" for part, s in parts if s / total >= 0.01),
        )
    for name, found in result["ratios"].items():
        kind = name.removeprefix("plain").removeprefix(", ")
        yield (
            f"step of the plain PyTorch baseline{f' ({kind})' if kind else ''} / our step, {whose}",
            f"{found['median']:.2f} x ({found['low']:.2f} to {found['high']:.2f}); by FLOPs alone {found['counted']:.2f} x",
        )
    for name, found in result.get("ablations", {}).items():
        yield (
            f"ablation: {name}; its step / our step, {whose}",
            f"{found['median']:.2f} x ({found['low']:.2f} to {found['high']:.2f})",
        )
    if "projection" in result:
        found = result["projection"]
        paper = found["paper_gpu_hours"]
        yield (
            f"projected from that step, {whose}",
            f"stage 1 {found['stage_1_gpu_hours']:,.0f} GPU-hours (paper "
            f"{paper[0]:,}), stage 2 {found['stage_2_gpu_hours']:,.1f} (paper {paper[1]})",
        )


def time_to_quality(result: dict) -> Iterator[tuple[str, str]]:
    """Yield a row for every quality: each variant's time, and the first one's over it."""
    # As the summary of the file takes them.
    runs = [run for run in result["runs"] if run["done"]] or result["runs"]
    settings = ", ".join([*result["overrides"], result["precision"], f"{len(runs)} seed(s)"])
    words = {"loss": "held-out velocity loss", "score": "strict score"}
    by_quality = {}
    for row in result["reached"]:
        by_quality.setdefault((row["what"], row["target"]), []).append(row)
    for (what, target), rows in by_quality.items():
        yield (
            f"training time to a {words[what]} of {target:g}, `{result['config']}` ({settings}); "
            f"{rows[0]['variant']}'s over it",
            "; ".join(in_time(row) for row in rows),
        )


def in_time(row: dict) -> str:
    """Return a variant's median time to a quality over the seeds, and its ratios, in words."""
    name, found = row["variant"], row.get("ratio")
    if None in row["s"] and found is None:
        return f"{name} reached it in {row['reached']} of {len(row['s'])} seeds"
    figure = f"{name} {statistics.median(row['s']):.0f} s"
    if found is None:
        return figure
    at_least = "at least " if found["at_least"] else ""
    figure += f", {at_least}{found['median']:.2f} x ({found['low']:.2f} to {found['high']:.2f})"
    if row["ratio_steps"]:
        figure += f", {row['ratio_steps']['median']:.2f} x in steps"
    if row.get("ratio_encoded"):
        figure += f", {row['ratio_encoded']['median']:.2f} x with the encoding before training"
    return figure


def startup(result):
    yield (
        f"start of a run, `{result['config']}`",
        f"imports {result['import_s']:.1f} s, ranks {result['ranks_s']:.1f} s, build "
        f"{result['build_s']:.1f} s, first step {result['first_step_s']:.1f} s, second {result['second_step_s']:.1f} s",
    )


def sizes_in_words(found):
    """Return one sentence on resuming with another number of ranks."""
    exact = [path for path, row in found.items() if row["bitwise_to_the_end"]]
    drift = max(row["worst_relative"] for row in found.values())
    rest = (
        f"; else the loss drifts by at most {drift:.0e} of itself in 50 steps"
        if len(exact) < len(found)
        else ""
    )
    in_order = all(
        row["samples_in_order"]
        and row["first_loss_bitwise"]
        and row["loads"] == row["bitwise_loads"]
        for row in found.values()
    )
    return (
        f"{', '.join(found)} ranks: {'same samples in the same order, state and first loss bitwise equal' if in_order else 'NOT EQUAL'}; "
        f"bitwise equal to the end for {' and '.join(exact)}{rest}"
    )


def hangs_in_words(found):
    found = found[0] if isinstance(found, list) else found
    return (
        f"{found['trials']} hangs of five kinds: {found['found_named_and_stacks_saved']} found, the rank named, all stacks saved; at "
        f"most {found['slowest_s_beyond_the_limit']} s after guard.hang_s"
    )


def deaths_in_words(found):
    named = (
        f", {found['and_named_the_dead']} named the dead rank"
        if "and_named_the_dead" in found
        else ""
    )
    return (
        f"{found['trials']} SIGKILLs of a rank: {found['survivor_gone_within_5_s']} jobs ended within 5 s (slowest {found['slowest_s']} s)"
        f"{named}; {found['first_step_of_the_next_start_within_60_s']} restarts trained within 60 s (slowest {found['slowest_start_s']} s)"
    )


def cases_in_words(found):
    return f"{found['cases']} cases: {found['as_promised']} as promised"


# Trial of tests/faults/survival.py -> (code and promise, its counts -> a sentence). In this order in the table.
PROMISES = {
    "kill_chain": (
        "C1: a committed checkpoint is never lost",
        lambda f: (
            f"{f['kills']:,} SIGKILLs of a rank, both ranks or the launcher, {f['kills_during_a_save']} during a save: {f['commits_lost']} commits "
            f"lost; final state and log {'equal' if f['final_state_and_log_equal_to_a_run_without_kills'] else 'DIFFER FROM'} an uninterrupted run's"
        ),
    ),
    "crash_points": (
        "C2: every crash point of a save is safe",
        lambda f: (
            f"killed at each of the {f['crash_points']} file operations of a save: {f['recovered']} recovered"
        ),
    ),
    "damages": (
        "C4: no damaged checkpoint is loaded",
        lambda f: (
            f"{f['cases']} damaged checkpoints, {f['of_them_single_bits']} of them by a single bit: {f['detected']} detected before anything "
            f"was loaded, {f['fell_back']} fell back to the one before"
        ),
    ),
    "damaged_starts": (
        "C4: a start skips a damaged checkpoint",
        lambda f: (
            f"{f['starts']} runs: {f['went_on_from_the_one_before_and_ended_at_the_same_bits']} resumed from the previous checkpoint and ended "
            "with the same bits"
        ),
    ),
    "bitwise_resumes": (
        "C5: a resume is bitwise exact",
        lambda f: (
            f"{f['trials']} kills at awkward moments: {f['bitwise']} runs went on with the same losses, samples and final state"
        ),
    ),
    "world_sizes": ("C6: the number of ranks may change", sizes_in_words),
    "real_world_sizes": ("C6 with the real model under ZeRO-3", sizes_in_words),
    "failing_disks": ("C9: a failing or full disk costs one save", cases_in_words),
    "retention": (
        "C10: removing old checkpoints is safe",
        lambda f: (
            f"{f['saves']} saves with {f['refused']} refused removals and {f['killed']} kills: a sound checkpoint after each of {f['sound_after_each']}"
        ),
    ),
    "deaths": ("F1: a dead rank ends the job", deaths_in_words),
    "real_deaths": ("F1 with the real model under ZeRO-3", deaths_in_words),
    "hangs": ("F2: a hang is found and explained", hangs_in_words),
    "false_alarms": (
        "F2: no false alarms",
        lambda f: (
            f"{f['steps']:,} steps, slow ones and slow disks among them: {f['alarms']} alarms"
        ),
    ),
    "requests_to_stop": (
        "F4: preemption loses nothing",
        lambda f: (
            f"{f['trials']} times SIGTERM or SIGUSR1 at a random moment: {f['same_step_committed_and_requeue_code']} saved the last step on all "
            f"ranks and exited with 75, at most {f['slowest_exit_s']} s later"
        ),
    ),
    "interrupted_starts": (
        "F6: a killed start does not block the next, real model",
        lambda f: (
            f"{f['trials']} SIGKILLs during compilation, indexing or connecting: {f['next_start_trains_within_60_s']} restarts trained within "
            f"60 s (slowest {f['slowest_start_s']} s), nothing left behind in {f['no_process_shared_memory_descriptor_or_port_left']}"
        ),
    ),
    "nonfinite": (
        "N1: NaN and infinity never reach weights, real model",
        lambda f: (
            f"{f['injections']} injections: weights, moments and EMA bitwise unchanged on both ranks in {f['every_bit_unchanged_on_both_ranks']}, "
            f"the samples named in {f['samples_named']}; {f['good_steps_that_counted']} of {f['good_steps_between']} good steps between counted"
        ),
    ),
    "hostile": ("S1: nothing that is loaded runs code", cases_in_words),
    "mistakes": ("S3: a mistake in a config fails at the start", cases_in_words),
    "bounded_loss": (
        "O3: what one fault can cost is bounded",
        lambda f: (
            "at most "
            + ", ".join(
                f"{f[f'on_{n}_gpus'].partition(' GPU-h')[0]} GPU-hours on {n} GPUs"
                for n in (8, 64, 256)
            )
            + " with the interval that a run recommends"
        ),
    ),
}


def rows_of(result):
    """Yield the figures of a result that names its own rows: {"rows": {what: figure}}, or {"trials": ...} of survival.py."""
    for name, (what, in_words) in PROMISES.items() if "trials" in result else ():
        if "found" in result["trials"].get(name, {}):
            found = result["trials"][name]["found"]
            broke = isinstance(found, dict) and found.get("broke_off")
            yield what, f"broke off: {broke}" if broke else in_words(found)
    for what, count in {} if "trials" in result else result.get("rows", {}).items():
        yield what, str(count)


def short(commits):
    """ "COMMIT, COMMIT and changes" -> nine digits of each, "+" after one with changes."""
    return ", ".join(commit[:9] + "+" * ("changes" in commit) for commit in commits.split(", "))


def table(section):
    """Return Markdown: a row for every figure of a section of benchmarks/README.md."""
    kinds = {
        "demo": demo,
        "loader": loader,
        "data-reliability": data_reliability,
        "ops": ops,
        "checkpoint": checkpoint,
        "precision": precision,
        "throughput": throughput,
        "startup": startup,
        "sampling": sampling,
        "survival": rows_of,
        "recipes": rows_of,
        "alignment": rows_of,
        "time-to-quality": time_to_quality,
    }
    rows = ["| what | figure | measured |", "|---|---|---|"]
    for kind in SECTIONS[section]:
        for path in sorted((ROOT / "benchmarks/results").glob(f"{kind}*.json")):
            result = json.loads(path.read_text())
            trials = {
                what: result["trials"][name]
                for name, (what, _) in PROMISES.items()
                if name in result.get("trials", {})
            }
            for what, figure in kinds[kind](result):
                # A row measured on its own day.
                facts = {
                    **result["machine"],
                    **result.get("of", {}).get(what, {}),
                    **trials.get(what, {}),
                }
                rows.append(
                    f"| {what} | {figure} | [{facts['date']}](results/{path.name}), {facts['device']}, {short(facts['commit'])} |"
                )
    return "\n".join(rows)


def escaped(text):
    """Return a text as the content of a Markdown table cell; code spans stay as they are."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def as_yaml(value):
    """Return a default as one writes it in a config."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def keys_table():
    """Return Markdown: a row for every config key; * marks those that a resumed run may change."""
    from iomm.engine.config import FREE_KEYS, RunConfig
    from iomm.engine.config_parser import documented

    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in documented(RunConfig):
        mark = "\\*" if key in FREE_KEYS else ""
        kind = "two numbers" if kind.startswith("tuple") else kind
        rows.append(f"| `{key}`{mark} | {kind} | `{as_yaml(default)}` | {escaped(meaning)} |")
    return "\n".join(rows)


def ops_table():
    """Return Markdown: a row for every backend of every op, in the order in which they are preferred."""
    from iomm.kernels import dispatch

    rows = ["| op | backend | runs on | status |", "|---|---|---|---|"]
    for op in dispatch.ops():
        module = importlib.import_module(f"iomm.kernels.{op}")
        what = " ".join(module.__doc__.strip().partition("\n\n")[0].split())
        bodies = dispatch._backends[op]
        first = {
            device: next(body for body in bodies if not body.devices or device in body.devices)
            for device in ("cpu", "cuda")
        }
        for i, body in enumerate(bodies):
            chosen = [
                name for device, name in (("cpu", "CPU"), ("cuda", "GPU")) if first[device] is body
            ]
            status = (
                f"default on {' and '.join(chosen)}"
                if chosen
                else body.note or f"after {bodies[i - 1].name}"
            )
            if body.name == "reference":
                status = f"the specification; {status}" if chosen else "the specification"
            where = (
                " and ".join({"cpu": "CPU", "cuda": "GPU"}[device] for device in body.devices)
                or "CPU and GPU"
            )
            file = Path(module.__file__).resolve().relative_to(ROOT / "kernels").as_posix()
            name = f"[`{op}`]({file}): {escaped(what)}" if i == 0 else ""
            rows.append(
                f"| {name} | {body.name} | {where}{f', {body.dtype_names}' if body.dtypes else ''} | {status} |"
            )
    return "\n".join(rows)


def parts():
    """Return {README: {name of a generated part: its Markdown}}."""
    return {
        "benchmarks/README.md": {section: table(section) for section in SECTIONS},
        "engine/README.md": {"config keys": keys_table()},
        "kernels/README.md": {"ops": ops_table()},
    }


def written(text, name, generated):
    """Return a README's text with `generated` between the marks of that part.

    Raises ValueError unless the part's first mark stands there once, with an end mark below it.
    """
    start = START.format(name)
    before, _, rest = text.partition(start)
    old, end, after = rest.partition(END)
    if text.count(start) != 1 or not end or "<!-- generated" in old:
        raise ValueError(f"the README must hold {start} once, and {END} below it")
    return f"{before}{start}\n{generated}\n{END}{after}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if a generated part is out of date",
    )
    args = parser.parse_args(argv)
    stale = []
    for readme, generated in parts().items():
        path = ROOT / readme
        text = before = path.read_text(encoding="utf-8")
        try:
            for name, markdown in generated.items():
                text = written(text, name, markdown)
        except ValueError as error:
            print(f"iomm: {readme}: {error}", file=sys.stderr)
            return 2
        if text == before:
            continue
        stale.append(readme)
        if not args.check:
            path.write_text(text, encoding="utf-8")
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run python benchmarks/report.py", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
