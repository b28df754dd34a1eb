"""Write the generated parts of the READMEs.

    python benchmarks/report.py [--check]

    benchmarks/README.md   tables of benchmarks/results/*.json by section; one function per kind of
                           result file selects the figures
    engine/README.md       every config key with its type, default and meaning, from the
                           dataclasses and their comments
    kernels/README.md      every op with its backends in order of preference, from their
                           registrations

With --check nothing is written, and the exit code is 1 if a part is out of date.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from iomm.checkout import enter

ROOT = enter(__file__)

from iomm.config import InputError

START, END = "<!-- generated: {} (python benchmarks/report.py) -->", "<!-- /generated -->"
# The rows of a table: what was measured, and the figure.
Rows = Iterator[tuple[str, str]]
# Section of benchmarks/README.md -> the kinds of result files in its table.
SECTIONS = {
    "speed": ("throughput", "precision", "ops", "loader", "sampling", "startup", "memory"),
    "reliability": ("survival", "data-reliability", "checkpoint"),
    "learning": ("demo", "alignment", "routing", "noise", "recipes", "time-to-quality"),
}


def label(kind: str, settings: list[str]) -> str:
    """Return the name of the result files of a kind for runs with these settings."""
    return "-".join([kind, *(setting.replace("=", "-").replace("/", "-") for setting in settings)])


def positive(kind: type) -> Callable[[str], int | float]:
    """Return an argparse type that accepts finite numbers of this kind above 0."""

    def read(text: str) -> int | float:
        try:
            if 0 < (number := kind(text)) < float("inf"):
                return number
        except ValueError:
            pass
        number_words = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {number_words} above 0, got {text}")

    return read


def command(main: Callable[[], int | None]) -> int | None:
    """Run a script's main() and return its exit code.

    An InputError, which is a mistake of the user, is printed as one line; the exit code is then 2.
    """
    try:
        return main()
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2


def pyplot() -> ModuleType | None:
    """Return matplotlib's pyplot for drawing into files.

    If matplotlib is missing, print a line about it and return None.
    """
    try:
        import matplotlib
    except ImportError:
        print("no PNG: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def demo(result: dict) -> Rows:
    """Yield a row per stage, and the share of correct samples per kind of condition.

    A result without "pretrain" is of a stage 2 that began with the stage 1 of another result.
    """
    stages = {"stage 1": result.get("pretrain"), "stage 2": result["finetune"]}
    stages = {stage: found for stage, found in stages.items() if found}
    given = "".join(f" {setting}" for setting in result.get("settings", ()))
    given = f" ({given.strip()})" if given else ""
    for stage, found in stages.items():
        yield (
            f"default run{given}, {stage}: {found['steps']} steps of "
            f"{found['global_batch']} images, {found['precision']}",
            f"{found['command_s']:.0f} s in total, {found['training_s']:.0f} s of them training, "
            f"{found['images_per_s']:.0f} images/s, loss {found['first_loss']:.2f} -> "
            f"{found['last_loss']:.2f}",
        )
    for way, shown in (("image", "masked images"), ("text", "captions")):
        yield (
            f"correct samples from {shown}{given}, after {' and after '.join(stages)}",
            "; ".join(
                f"{words} " + " and ".join(f"{found[key][way]:.0%}" for found in stages.values())
                for key, words in (
                    ("fits", "whole caption"),
                    ("number", "number of shapes"),
                    ("colours", "number and colours"),
                )
            ),
        )


def loader(result: dict) -> Rows:
    """Yield decoding on a GPU, or the loader against Pillow, the index and the reader."""
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
        f"{result['ours_wall_ratio']:.2f} x the images/s ({low:.2f} to {high:.2f}), "
        f"{result['ours_cpu_ratio']:.2f} x less CPU time per image",
    )
    yield (
        "index of 10 M samples",
        f"{result['index_mb_at_10m']:.0f} MB, first batch after "
        f"{result['first_batch_s_at_10m']:.1f} s",
    )
    yield (
        "reading 100 images/s from tars",
        f"{result['reader_core_share_at_100_images_per_s']:.1%} of one core",
    )


def data_reliability(result: dict) -> Rows:
    """Yield the trials D1 to D8 on damaged and unusual data."""
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
        f"{flips['trials']:,} single-bit flips: {flips['caught_by_the_checksum']:,} caught by the "
        "checksum",
    )
    yield (
        "D4: damaged tars lose nothing silently",
        f"{tars['cases']} damaged tars: "
        f"{tars['good_and_reported_samples_as_wanted']} yield and report the expected samples",
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


def ops(result: dict) -> Rows:
    """Yield a row per backend that was compared with the PyTorch reference."""
    for row in result["rows"]:
        if row.get("speedups", {}).get("reference"):
            yield (
                f"op `{row['op']}` ({row['case']}), backend {row['body']}",
                f"{row['ms']:.2f} ms, {row['speedups']['reference']:.1f} x the PyTorch reference",
            )


def checkpoint(result: dict) -> Rows:
    """Yield what a save costs."""
    yield (
        f"saving {result['parameters'] / 1e6:.1f} M parameters with moments and EMA, "
        f"{result['bytes'] / 2**20:.0f} MiB",
        f"training is blocked for {result['stall_s'] * 1e3:.0f} ms, the checkpoint is committed "
        f"after {result['commit_s']:.2f} s and verified in {result['verify_s']:.2f} s",
    )


def precision(result: dict) -> Rows:
    """Yield the loss in fp8 against bf16."""
    fp8 = result["runs"]["fp8"]
    yield (
        f"fp8 against bf16, loss after {result['steps']} steps",
        f"{fp8['last_loss']:.4f}, {result['fp8_over_bf16']:+.2%} (another seed: "
        f"{result['seed_over_bf16']:+.2%}); images/s x {result['speedup']:.2f}",
    )


def sampling(result: dict) -> Rows:
    """Yield a row per sampling rate, eager and compiled."""
    for row in result["rows"]:
        passes = f"{row['steps']} steps" + (" x 2 (guidance)" if row["guidance"] != 1 else "")
        compiled = ", compiled" if row["compiled"] else ""
        yield (
            f"sampling from text, {row['size_px'][1]} x {row['size_px'][0]} px, generator of "
            f"{row['parameters'] / 1e6:.0f} M, {passes}, batch {row['batch']}, "
            f"{row['dtype']}{compiled}",
            f"{row['images_per_s']:.3g} images/s, generator at {row['generator_tflops']:.3g} "
            "TFLOP/s",
        )


def baseline_name(name: str) -> str:
    """Return the name of a row or variant with the old spelling "plain" replaced by "baseline".

    Older result files, and users of older versions, have the old spelling.
    """
    word, comma, rest = name.partition(",")
    return f"baseline{comma}{rest}" if word == "plain" else name


def throughput(result: dict) -> Rows:
    """Yield our step, the shares of its parts, the baseline, the ablations and the projection."""
    batch, ours = result["images_a_step"], result["rows"]["ours"]
    # Changes that every measurement makes are not part of the config's name.
    always_changed = (
        "run.dir",
        "train.",
        "data.max_bad_fraction",
        "data.shards=",
        "data.heldout=",
        "evaluate.",
        "precision",
    )
    changed = [change for change in result["changed"] if not change.startswith(always_changed)]
    whose = f"`{' '.join([result['config'], *changed])}`, {result['precision']}"
    mfu = f", mfu {result['mfu']:.1%}" if result["mfu"] else ""
    yield (
        f"training step, {whose}, {batch} images",
        f"{ours['s'] * 1e3:.0f} ms, {ours['images_per_s']:.2f} images/s, "
        f"{result['of_matmul_rate']:.0%} of this machine's matmul rate{mfu}, peak memory "
        f"{result['peak_memory_gib']:.1f} GiB",
    )
    if "split_s" in result:
        total = sum(result["split_s"].values())
        parts = sorted(result["split_s"].items(), key=lambda pair: -pair[1])
        yield (
            f"share of each part of that step, {whose}",
            ", ".join(f"{part} {s / total:.0%}" for part, s in parts if s / total >= 0.01),
        )
    for name, found in result["ratios"].items():
        kind = baseline_name(name).removeprefix("baseline").removeprefix(", ")
        yield (
            f"step of the PyTorch baseline{f' ({kind})' if kind else ''} / our step, {whose}",
            f"{found['median']:.2f} x ({found['low']:.2f} to {found['high']:.2f}); by FLOPs alone "
            f"{found['counted']:.2f} x",
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
            f"stage 1 {found['stage_1_gpu_hours']:,.0f} GPU-hours (paper {paper[0]:,}), "
            f"stage 2 {found['stage_2_gpu_hours']:,.1f} (paper {paper[1]})",
        )


def time_to_quality(result: dict) -> Rows:
    """Yield a row per quality: each variant's time, and the first one's time over it."""
    # The same runs as in the file's summary: the seeds that are done, or all if none is.
    runs = [run for run in result["runs"] if run["done"]] or result["runs"]
    settings = ", ".join([*result["overrides"], result["precision"], f"{len(runs)} seed(s)"])
    words = {"loss": "held-out velocity loss", "score": "strict score"}
    by_quality = {}
    for row in result["reached"]:
        by_quality.setdefault((row["what"], row["target"]), []).append(row)
    for (what, target), rows in by_quality.items():
        yield (
            f"training time to a {words[what]} of {target:g}, `{result['config']}` ({settings}); "
            f"ratios: {baseline_name(rows[0]['variant'])}'s time over the variant's",
            "; ".join(time_in_words(row) for row in rows),
        )


def time_in_words(row: dict) -> str:
    """Return a variant's median time to a quality over the seeds, and its ratios, in words."""
    name, found = baseline_name(row["variant"]), row.get("ratio")
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
        figure += f", {row['ratio_encoded']['median']:.2f} x including the encoding"
    return figure


def startup(result: dict) -> Rows:
    """Yield what a start costs."""
    yield (
        f"start of a run, `{result['config']}`",
        f"imports {result['import_s']:.1f} s, ranks {result['ranks_s']:.1f} s, build "
        f"{result['build_s']:.1f} s, first step {result['first_step_s']:.1f} s, second "
        f"{result['second_step_s']:.1f} s",
    )


def memory(result: dict) -> Rows:
    """Yield a row per way to build a model, with the host memory of each number of ranks."""
    by_build = {}
    for row in result["rows"]:
        by_build.setdefault((row["stored"], row["precision"], row["device"]), []).append(row)
    for (stored, precision, device), rows in by_build.items():
        where = "a CPU" if device == "cpu" else "a device with its own memory (meta)"
        ranks = ", ".join(str(row["num_ranks"]) for row in rows)

        def each(key: str, rows: list[dict] = rows) -> str:
            return ", ".join(f"{max(row[key], 0):,.0f}" for row in rows)

        yield (
            f"host memory of {ranks} rank(s) that build a model on {where}: MLLM of "
            f"{rows[0]['file_mb']:.0f} MB in {stored}, used in {precision}, and trained parts of "
            f"{rows[0]['trained_mb']:.0f} MB",
            f"private to the ranks {each('peak_private_mb')} MB at the peak and "
            f"{each('after_private_mb')} MB after it; with shared pages "
            f"{each('after_with_shared_mb')} MB after it",
        )


def sizes_in_words(found: dict) -> str:
    """Return one sentence on resuming with another number of ranks."""
    exact = [path for path, row in found.items() if row["bitwise_to_the_end"]]
    drift = max(row["worst_relative"] for row in found.values())
    rest = (
        f"; otherwise the loss drifts by at most {drift:.0e} (relative) in 50 steps"
        if len(exact) < len(found)
        else ""
    )
    in_order = all(
        row["samples_in_order"]
        and row["first_loss_bitwise"]
        and row["loads"] == row["bitwise_loads"]
        for row in found.values()
    )
    equal = "same samples in the same order, state and first loss bitwise equal"
    return (
        f"{', '.join(found)} ranks: {equal if in_order else 'NOT EQUAL'}; bitwise equal to the end "
        f"for {' and '.join(exact)}{rest}"
    )


def hangs_in_words(found: dict | list) -> str:
    """Return one sentence on hangs that were detected."""
    found = found[0] if isinstance(found, list) else found
    return (
        f"{found['trials']} hangs of five kinds: {found['found_named_and_stacks_saved']} detected, "
        f"with the rank named and all stacks saved, at most {found['slowest_s_beyond_the_limit']} "
        "s after guard.hang_s"
    )


def deaths_in_words(found: dict) -> str:
    """Return one sentence on ranks that were killed."""
    named = (
        f", {found['and_named_the_dead']} named the dead rank"
        if "and_named_the_dead" in found
        else ""
    )
    return (
        f"{found['trials']} SIGKILLs of a rank: {found['survivor_gone_within_5_s']} jobs ended "
        f"within 5 s (slowest {found['slowest_s']} s){named}; "
        f"{found['first_step_of_the_next_start_within_60_s']} restarts trained within 60 s "
        f"(slowest {found['slowest_start_s']} s)"
    )


def cases_in_words(found: dict) -> str:
    """Return one sentence on cases with an expected outcome."""
    return f"{found['cases']} cases: {found['as_promised']} as specified"


def kill_chain_in_words(found: dict) -> str:
    """Return one sentence on a run that was killed over and over."""
    equal = found["final_state_and_log_equal_to_a_run_without_kills"]
    return (
        f"{found['kills']:,} SIGKILLs of a rank, both ranks or the launcher, "
        f"{found['kills_during_a_save']} during a save: {found['commits_lost']} commits lost; "
        f"final state and log {'equal' if equal else 'DIFFER FROM'} an uninterrupted run's"
    )


def bounded_loss_in_words(found: dict) -> str:
    """Return one phrase on what a fault costs by number of GPUs."""
    costs = [
        f"{found[f'on_{n}_gpus'].partition(' GPU-h')[0]} GPU-hours on {n} GPUs"
        for n in (8, 64, 256)
    ]
    return f"at most {', '.join(costs)} with the interval that a run recommends"


def first_part(found: dict | list) -> dict:
    """Return the counts of a trial that may also list its failures."""
    return found[0] if isinstance(found, list) else found


def hosts_train_in_words(found: dict) -> str:
    """Return one sentence on runs on several hosts."""
    rows = list(found.values())
    return (
        f"{len(rows)} runs on {min_max([key.split()[-2] for key in found])} hosts against runs on "
        f"one: {sum(r['samples_in_order'] for r in rows)} "
        f"with the same samples in the same order, {sum(r['first_loss_bitwise'] for r in rows)} "
        "with a bitwise equal first loss; the loss drifts by at most "
        f"{max(r['worst_relative'] for r in rows):.0e} (relative) in 20 steps"
    )


def min_max(numbers: list[str]) -> str:
    """Return "2 to 4" for the smallest and the largest number."""
    return f"{min(map(int, numbers))} to {max(map(int, numbers))}"


def lost_hosts_in_words(found: dict | list) -> str:
    """Return one sentence on lost hosts."""
    found = first_part(found)
    return (
        f"{found['trials']} times one of {found['hosts']} hosts was killed or its link cut: in "
        f"{found['exit_70_and_host_named_on_every_survivor']} every survivor exited with code 70 "
        f"and named it, at most {found['slowest_s_after_a_kill']} s after a kill and "
        f"{found['slowest_s_after_a_cut']} s after a cut (guard.lost_s = {found['lost_s']:g})"
    )


def returning_links_in_words(found: dict | list) -> str:
    """Return one sentence on links that return."""
    found = first_part(found)
    cuts = " or ".join(f"{cut:g}" for cut in found["cut_for_s"])
    return (
        f"{found['trials']} cuts of {cuts} s in the middle of training: "
        f"{found['went_on_with_the_same_bits']} runs continued with the same losses and state"
    )


def bad_network_in_words(found: dict) -> str:
    """Return one sentence on a slow network that loses packets."""
    return (
        f"{found['steps']} steps with {found['lost_packets']} of packets lost and each delayed by "
        f"{found['delay_ms']} ms: {found['alarms']} alarms, losses and state "
        f"{'bitwise equal to' if found['same_bits'] else 'DIFFERENT FROM'} those without"
    )


def preempted_hosts_in_words(found: dict | list) -> str:
    """Return one sentence on preempted hosts."""
    found = first_part(found)
    good = found["same_step_saved_exit_75_and_same_batches_on_the_hosts_left"]
    return (
        f"{found['trials']} times SIGTERM on one of {found['hosts']} hosts: {good} jobs saved the "
        f"same step, exited with code 75 on all within {found['slowest_exit_s']} s, and resumed on "
        "the hosts that were left with the same global batches"
    )


def wire_cases(found: dict) -> dict[tuple[int, int], dict]:
    """Return {(ZeRO stage, hosts): figures} of the trial on bytes."""
    return {
        (int(key.split()[1].rstrip(",")), int(key.split()[2])): figures
        for key, figures in found.items()
        if isinstance(figures, dict)
    }


def wire_in_words(found: dict) -> str:
    """Return one sentence on the bytes on the wire."""
    cases = wire_cases(found)
    more = [figures["more"] for figures in cases.values()]
    return (
        f"{len(cases)} cases (ZeRO stages 0 to 3 on {min_max([str(n) for _, n in cases])} hosts, "
        f"{found['steps']} steps each): "
        f"measured bytes, headers included, are {min(more):.1%} to {max(more):.1%} above the count"
    )


def wire_table() -> str:
    """Return the Markdown table of counted and measured bytes."""
    result = json.loads((ROOT / "benchmarks/results/survival.json").read_text())
    cases = wire_cases(result["trials"].get("wire", {}).get("found", {}))
    rows = [
        "| ZeRO stage | hosts | counted MB | measured MB | difference | packets |",
        "|---|---|---|---|---|---|",
    ]
    for (stage, hosts), figures in sorted(cases.items()):
        counted, measured = (figures[f"{name}_bytes"] / 1e6 for name in ("counted", "measured"))
        rows.append(
            f"| {stage} | {hosts} | {counted:.2f} | {measured:.2f} | {figures['more']:+.2%} | "
            f"{figures['packets']:,} |"
        )
    return "\n".join(rows)


# Trial of tests/faults/survival.py -> (code and promise, function from its counts to a sentence),
# in the order of the table.
PROMISES = {
    "kill_chain": (
        "C1: a committed checkpoint is never lost",
        kill_chain_in_words,
    ),
    "crash_points": (
        "C2: every crash point of a save is safe",
        lambda f: (
            f"killed at each of the {f['crash_points']} file operations of a save: "
            f"{f['recovered']} recovered"
        ),
    ),
    "damages": (
        "C4: no damaged checkpoint is loaded",
        lambda f: (
            f"{f['cases']} damaged checkpoints, {f['of_them_single_bits']} of them by a single "
            f"bit: {f['detected']} detected before anything was loaded, {f['fell_back']} times the "
            "previous checkpoint was used"
        ),
    ),
    "damaged_starts": (
        "C4: a start skips a damaged checkpoint",
        lambda f: (
            f"{f['starts']} runs: "
            f"{f['went_on_from_the_one_before_and_ended_at_the_same_bits']} resumed from the "
            "previous checkpoint and ended with the same bits"
        ),
    ),
    "bitwise_resumes": (
        "C5: a resume is bitwise exact",
        lambda f: (
            f"{f['trials']} kills at difficult moments: {f['bitwise']} runs resumed with the same "
            "losses, samples and final state"
        ),
    ),
    "world_sizes": ("C6: the number of ranks may change", sizes_in_words),
    "real_world_sizes": ("C6 with the real model under ZeRO-3", sizes_in_words),
    "failing_disks": ("C9: a failing or full disk costs one save", cases_in_words),
    "retention": (
        "C10: removing old checkpoints is safe",
        lambda f: (
            f"{f['saves']} saves with {f['refused']} refused removals and {f['killed']} kills: a "
            f"sound checkpoint after {f['sound_after_each']} of them"
        ),
    ),
    "deaths": ("F1: a dead rank ends the job", deaths_in_words),
    "real_deaths": ("F1 with the real model under ZeRO-3", deaths_in_words),
    "hangs": ("F2: a hang is detected and explained", hangs_in_words),
    "false_alarms": (
        "F2: no false alarms",
        lambda f: (
            f"{f['steps']:,} steps, including slow steps and slow disks: {f['alarms']} alarms"
        ),
    ),
    "requests_to_stop": (
        "F4: preemption loses nothing",
        lambda f: (
            f"{f['trials']} times SIGTERM or SIGUSR1 at a random moment: "
            f"{f['same_step_committed_and_requeue_code']} jobs saved the last step on all ranks "
            f"and exited with code 75 within {f['slowest_exit_s']} s"
        ),
    ),
    "interrupted_starts": (
        "F6: a killed start does not block the next, real model",
        lambda f: (
            f"{f['trials']} SIGKILLs during compilation, indexing or connecting: "
            f"{f['next_start_trains_within_60_s']} restarts trained within 60 s (slowest "
            f"{f['slowest_start_s']} s); no process, shared memory, descriptor or port was left "
            f"over in {f['no_process_shared_memory_descriptor_or_port_left']}"
        ),
    ),
    "nonfinite": (
        "N1: NaN and infinity never reach weights, real model",
        lambda f: (
            f"{f['injections']} injections: weights, moments and EMA bitwise unchanged on both "
            f"ranks in {f['every_bit_unchanged_on_both_ranks']}, the samples named in "
            f"{f['samples_named']}; {f['good_steps_that_counted']} of {f['good_steps_between']} "
            "good steps in between applied"
        ),
    ),
    "hostile": ("S1: nothing that is loaded runs code", cases_in_words),
    "mistakes": ("S3: a mistake in a config fails at the start", cases_in_words),
    "toy_hosts": ("H1: several hosts train like one", hosts_train_in_words),
    "hosts_train": ("H1 with the real model under ZeRO-3", hosts_train_in_words),
    "lost_hosts": ("H2: a lost host ends the job in seconds", lost_hosts_in_words),
    "returning_links": ("H3: a link that returns in time costs nothing", returning_links_in_words),
    "bad_network": ("H4: a bad network is no fault", bad_network_in_words),
    "preempted_hosts": ("H5: preemption of one host saves all", preempted_hosts_in_words),
    "wire": ("H6: counted bytes are the bytes on the wire, real model", wire_in_words),
    "bounded_loss": (
        "O3: the cost of a single fault is bounded",
        bounded_loss_in_words,
    ),
}


def rows_of(result: dict) -> Rows:
    """Yield the figures of a result that names its own rows.

    These are {"rows": {what: figure}}, or {"trials": ...} of tests/faults/survival.py.
    """
    if "trials" not in result:
        for what, count in result.get("rows", {}).items():
            yield what, str(count)
        return
    for name, (what, in_words) in PROMISES.items():
        if "found" in result["trials"].get(name, {}):
            found = result["trials"][name]["found"]
            reason = isinstance(found, dict) and found.get("broke_off")
            yield what, f"aborted: {reason}" if reason else in_words(found)


def short_commits(commits: str) -> str:
    """Shorten commits to nine digits each, with "+" after one that had uncommitted changes.

    The input has the form "COMMIT, COMMIT and changes".
    """
    return ", ".join(
        f"{commit[:9]}+" if "changes" in commit else commit[:9] for commit in commits.split(", ")
    )


def table(section: str) -> str:
    """Return the Markdown table of a section of benchmarks/README.md, a row per figure."""
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
        "memory": memory,
        "survival": rows_of,
        "recipes": rows_of,
        "alignment": rows_of,
        "routing": rows_of,
        "noise": rows_of,
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
                # Some rows were measured on another day or commit than the rest of their file.
                facts = {
                    **result["machine"],
                    **result.get("of", {}).get(what, {}),
                    **trials.get(what, {}),
                }
                measured = (
                    f"[{facts['date']}](results/{path.name}), {facts['device']}, "
                    f"{short_commits(facts['commit'])}"
                )
                rows.append(f"| {what} | {figure} | {measured} |")
    return "\n".join(rows)


def escaped(text: str) -> str:
    """Escape a text for a Markdown table cell; code spans stay as they are."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def as_yaml(value: Any) -> str:
    """Return a default in the notation of a config file."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def keys_table() -> str:
    """Return the Markdown table of config keys; * marks those that a resumed run may change."""
    from iomm.engine.config import FREE_KEYS, RunConfig
    from iomm.engine.config_parser import documented

    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in documented(RunConfig):
        mark = "\\*" if key in FREE_KEYS else ""
        kind = "text or list" if kind == "tuple[str, ...]" else kind
        kind = "two numbers" if kind.startswith("tuple") else kind
        rows.append(f"| `{key}`{mark} | {kind} | `{as_yaml(default)}` | {escaped(meaning)} |")
    return "\n".join(rows)


def ops_table() -> str:
    """Return the Markdown table of ops, a row per backend in order of preference."""
    from iomm.kernels import dispatch

    rows = ["| op | backend | runs on | status |", "|---|---|---|---|"]
    for op in dispatch.ops():
        module = importlib.import_module(f"iomm.kernels.{op}")
        what = " ".join(module.__doc__.strip().partition("\n\n")[0].split())
        backends = dispatch._backends[op]
        first = {
            device: next(b for b in backends if not b.devices or device in b.devices)
            for device in ("cpu", "cuda")
        }
        for i, backend in enumerate(backends):
            chosen = [
                name
                for device, name in (("cpu", "CPU"), ("cuda", "GPU"))
                if first[device] is backend
            ]
            status = (
                f"default on {' and '.join(chosen)}"
                if chosen
                else backend.note or f"after {backends[i - 1].name}"
            )
            if backend.name == "reference":
                status = f"the specification; {status}" if chosen else "the specification"
            where = (
                " and ".join({"cpu": "CPU", "cuda": "GPU"}[device] for device in backend.devices)
                or "CPU and GPU"
            )
            file = Path(module.__file__).resolve().relative_to(ROOT / "kernels").as_posix()
            name = f"[`{op}`]({file}): {escaped(what)}" if i == 0 else ""
            dtypes = f", {backend.dtype_names}" if backend.dtypes else ""
            rows.append(f"| {name} | {backend.name} | {where}{dtypes} | {status} |")
    return "\n".join(rows)


def parts() -> dict[str, dict[str, str]]:
    """Return {README: {name of a generated part: its Markdown}}."""
    return {
        "benchmarks/README.md": {
            **{section: table(section) for section in SECTIONS},
            "wire": wire_table(),
        },
        "engine/README.md": {"config keys": keys_table()},
        "kernels/README.md": {"ops": ops_table()},
    }


def written(text: str, name: str, generated: str) -> str:
    """Return a README's text with `generated` between the marks of that part.

    Raises:
        ValueError: unless the part has exactly one start mark, with an end mark below it.
    """
    start = START.format(name)
    before, _, rest = text.partition(start)
    old, end, after = rest.partition(END)
    if text.count(start) != 1 or not end or "<!-- generated" in old:
        raise ValueError(f"the README must contain {start} once, with {END} below it")
    return f"{before}{start}\n{generated}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
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
