"""Gathers benchmarks/results/*.json into the README's table: python benchmarks/report.py

One function a kind of result file says which of its figures the README quotes; none is typed by hand."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks"))]

from iomm.config import InputError  # noqa: E402

START, END = "<!-- measured: made by benchmarks/report.py -->", "<!-- /measured -->"


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
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number above 0, got {text}")
    return read


def command(main):
    """Exit code of a script: a mistake of who runs it is one line, and 2."""
    try:
        return main()
    except InputError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2


def pyplot():
    """matplotlib's pyplot, to draw into files; where it is missing None, and one line says so."""
    try:
        import matplotlib
    except ImportError:
        print('no PNG: matplotlib is missing (pip install matplotlib)')
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot


def demo(result):
    one, two = result["pretrain"], result["finetune"]
    given = "".join(f" {setting}" for setting in result.get("settings", ()))
    for name, found in ((f"default command{given}, stage 1", one), ("stage 2 after it, half images, half of 500 pairs", two)):
        yield (f"{name}: {found['steps']} steps of {found['global_batch']} images, {found['precision']}",
               f"{found['command_s']:.0f} s, {found['training_s']:.0f} of them training, {found['images_per_s']:.0f} images/s, loss "
               f"{found['first_loss']:.2f} -> {found['last_loss']:.2f}")
    for way, shown in (("image", "half-masked images drawn whole"), ("text", "captions drawn")):
        yield (f"{shown}, after stage 1 and after stage 2 of {one['steps']:,} steps",
               "; ".join(f"{words} {one[key][way]:.0%}, {two[key][way]:.0%}" for key, words in
                         (("fits", "all of the caption right"), ("number", "number of shapes"), ("colours", "number and colours"))))


def loader(result):
    if "gpu_images_per_s" in result:
        yield ("decoding on the GPU, photographs to 512 px", f"{result['gpu_images_per_s']:.0f} images/s; products beside 80 images/s take "
               f"{result['gpu_time_taken_at_80_images_per_s']:.1%} longer")
        return
    low, high = result["ours_wall_ratio_range"]
    yield ("loader on two cores, photographs to 512 px, against Pillow + torch DataLoader",
           f"{result['ours_wall_ratio']:.2f} x images/s ({low:.2f} to {high:.2f}), {result['ours_cpu_ratio']:.2f} x less CPU an image")
    yield ("index of 10 M samples", f"{result['index_mb_at_10m']:.0f} MB, first batch after {result['first_batch_s_at_10m']:.1f} s")
    yield ("readers at 100 images/s", f"{result['reader_core_share_at_100_images_per_s']:.1%} of a core")


def data_reliability(result):
    mutations, flips = result["mutations"], result["bit_flips_in_entropy_data"]
    yield "malformed images with the wanted verdict", f"{result['images']['with_the_wanted_verdict']} of {result['images']['cases']}"
    yield ("damaged images by mutation", f"{mutations['mutations']:,}: none crashed, none passed that DALI refuses, "
           f"slowest {mutations['slowest_s'] * 1e3:.0f} ms")
    yield "bit flips caught by the checksum", f"{flips['caught_by_the_checksum']} of {flips['trials']}"


def ops(result):
    for row in result["rows"]:
        if row.get("speedups", {}).get("reference"):
            yield (f"`{row['op']}` ({row['case']}), {row['body']} body",
                   f"{row['ms']:.2f} ms, {row['speedups']['reference']:.1f} x the PyTorch reference")


def checkpoint(result):
    yield (f"checkpoint of {result['parameters'] / 1e6:.1f} M parameters with moments and average, {result['bytes'] / 2**20:.0f} MiB",
           f"training waits {result['stall_s'] * 1e3:.0f} ms, committed after {result['commit_s']:.2f} s, verified in "
           f"{result['verify_s']:.2f} s")


def precision(result):
    fp8 = result["runs"]["fp8"]
    yield (f"fp8 against bf16, loss after {result['steps']} steps", f"{fp8['last_loss']:.4f}, {result['fp8_over_bf16']:+.2%} (another seed: "
           f"{result['seed_over_bf16']:+.2%}); images/s x {result['speedup']:.2f}")


def sampling(result):
    for row in result["rows"]:
        passes = f"{row['steps']} steps" + (" x 2 (guidance)" if row["guidance"] != 1 else "")
        yield (f"drawing {row['size_px'][1]} x {row['size_px'][0]} px, generator of {row['parameters'] / 1e6:.0f} M, {passes}, batch "
               f"{row['batch']}, {row['dtype']}{', compiled' if row['compiled'] else ''}",
               f"{row['images_per_s']:.3g} images/s, generator at {row['generator_tflops']:.3g} TFLOP/s")


def throughput(result):
    rows, batch = result["rows"], result["images_a_step"]
    ours, bare = rows["ours"], ("run.dir", "train.", "data.max_bad_fraction", "data.shards=", "data.heldout=", "evaluate.", "precision")
    whose = f"`{' '.join([result['config'], *(c for c in result['changed'] if not c.startswith(bare))])}`, {result['precision']}"
    mfu = f", mfu {result['mfu']:.1%}" if result["mfu"] else ""
    yield (f"training step of {whose}, {batch} images",
           f"{ours['s'] * 1e3:.0f} ms, {ours['images_per_s']:.2f} images/s, {result['of_matmul_rate']:.0%} of the matmul rate{mfu}, "
           f"peak memory {result['peak_memory_gib']:.1f} GiB")
    if "split_s" in result:
        total = sum(result["split_s"].values())
        parts = sorted(result["split_s"].items(), key=lambda pair: -pair[1])
        yield (f"where that time goes, {whose}", ", ".join(f"{part} {s / total:.0%}" for part, s in parts if s / total >= 0.01))
    for name, found in result["ratios"].items():
        kind = name.removeprefix("plain").removeprefix(", ")
        yield (f"plain PyTorch{f' ({kind})' if kind else ''}, its step over ours, {whose}",
               f"{found['median']:.2f} x ({found['low']:.2f} to {found['high']:.2f}), counted {found['counted']:.2f}")
    for name, found in result.get("ablations", {}).items():
        yield f"our step with {name}, {whose}", f"{found['median']:.2f} x ({found['low']:.2f} to {found['high']:.2f})"
    if "projection" in result:
        found = result["projection"]
        paper = found["paper_gpu_hours"]
        yield (f"projected from that step, {whose}", f"stage 1 {found['stage_1_gpu_hours']:,.0f} GPU-hours (paper "
               f"{paper[0]:,}), stage 2 {found['stage_2_gpu_hours']:,.1f} (paper {paper[1]})")


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
    yield (f"start of a run of `{result['config']}`", f"imports {result['import_s']:.1f} s, ranks {result['ranks_s']:.1f} s, build "
           f"{result['build_s']:.1f} s, first step {result['first_step_s']:.1f} s, second {result['second_step_s']:.1f} s")


def rows_of(result):
    """A result that says itself what is quoted: {"rows": {what: figure}}."""
    for what, count in result.get("rows", {}).items():
        yield what, str(count)


def short(commits):
    """"COMMIT, COMMIT and changes" -> nine digits of each, "+" after one with changes."""
    return ", ".join(commit[:9] + "+" * ("changes" in commit) for commit in commits.split(", "))


def table():
    """Markdown: a row for every figure that is quoted."""
    kinds = {"demo": demo, "loader": loader, "data-reliability": data_reliability, "ops": ops,
             "checkpoint": checkpoint, "precision": precision, "throughput": throughput, "startup": startup,
             "sampling": sampling, "survival": rows_of, "budget": rows_of, "recipes": rows_of,
             "time-to-quality": time_to_quality}
    rows = ["| what | figure | machine, date, commit (+: with changes that are not in it) | file |", "|---|---|---|---|"]
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        result = json.loads(path.read_text())
        kind = next((kind for kind in kinds if path.name.startswith(kind)), None)
        for what, figure in kinds[kind](result) if kind else ():
            facts = {**result["machine"], **result.get("of", {}).get(what, {})}      # a row measured on its own day
            rows.append(f"| {what} | {figure} | {facts['device']}, {facts['date']}, {short(facts['commit'])} | `{path.name}` |")
    return "\n".join(rows)


def written(text, rows):
    """README's text with these rows between its two marks. Raises ValueError unless each mark stands there once."""
    if not (text.count(START) == text.count(END) == 1 and text.index(START) < text.index(END)):
        raise ValueError(f"the README must hold {START} and, below it, {END}, once each")
    return f"{text.partition(START)[0]}{START}\n{rows}\n{END}{text.partition(END)[2]}"


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    readme = ROOT / "README.md"
    try:
        readme.write_text(written(readme.read_text(), table()))
    except ValueError as error:
        print(f"iomm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
