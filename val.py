"""Evaluate a trained run: its scores by every definition, what it found, a table of the images and a report.

python val.py --name run1
python val.py --name run1 --open                    # shows the report in the browser
python val.py --name run1 --dataset other_nuclei    # all images of another data set
python val.py --name run1 --split my_split.yml      # the `test:` ids of a split of your own
python val.py --name run1 --levels                  # what each pruned model costs and gives
python val.py --name nuclei --submission nuclei.csv # a run of --target instances; the file of the Data Science Bowl

A run of masks is scored by IoU and Dice at the training size. A run of individual nuclei (--target instances) sees
whole pictures, finds the scale of each, and is scored nucleus by nucleus at each picture's own size.
"""

import time
from pathlib import Path

from common.cli import (
    Parser,
    add_machine_options,
    answer_early,
    data_set,
    listed,
    number,
    parse_options,
    run_script,
    warn,
)
from inference import LEVELS


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("--name", help="models/<name>; default: the newest run")
    a(
        "--dataset",
        type=data_set,
        help="evaluate all images of this folder in inputs/; default: the run's validation images",
    )
    a("--split", help="evaluate the `test:` ids of this split.yml")
    a("-b", "--batch_size", type=number(int, 1), default=16, help="affects the speed only")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--level", choices=LEVELS, help="prune to this head; mean: judge the average of all heads")
    group.add_argument("--levels", action="store_true", help="measure each level: accuracy, time, memory, parameters")
    a("--tta", action="store_true", help="average over eight flips and rotations: eight times the work")
    a("--explain", action="store_true", help="print the definition of each column; the report has them in any case")
    submission = "CSV file for the nuclei of all images in the format of the Data Science Bowl; --target instances"
    a("--submission", type=Path, metavar="FILE", help=submission)
    a("--open", action="store_true", help="open the report in the browser")
    a = add_machine_options(parser).add_argument
    a("--num_workers", type=number(int, 0, 1024), default=0, help="loader processes, for masks")
    return parser


answer_early(__name__, build_parser)  # the imports below take seconds

import numpy as np
import pandas as pd
from tqdm import tqdm

import instances
import levels
from common.devices import device_name, keep_memory, precision_name
from common.distributed import launched
from common.files import atomic_path, read_yaml, replacing
from common.lookalikes import Sketches, groups
from common.report import open_page
from common.runs import OUTPUTS, newest_run, run_folder
from data_folder import INPUTS, check_layout, classes_of, list_ids, usual_ending
from dataset import GROUPED, RANDOM, changes, check_split, make_loader
from evaluation import (
    HEADINGS,
    Predictions,
    gallery_items,
    rows_of_classes,
    rows_of_heads,
    rows_of_images,
    scores_by_twins,
    write_examples,
    write_report,
)
from inference import Predictor
from metrics import DEFINITIONS, bootstrap_interval, count_pixels, summarise
from nuclei import evaluation as of_nuclei
from nuclei.find import find_nuclei
from nuclei.object_files import check_submission, write_submission
from run_config import is_of_nuclei, kept_epoch, read_config
from training_data import open_images
from utils import count_params

# ---------------------------------------------------------------- what to evaluate


def check_classes(config, name, folder):
    """ValueError when the data set has other classes than the run in `folder`; FileNotFoundError for missing files."""
    root, count = INPUTS / name, config["num_classes"]
    found = len(classes_of(root))
    if name != config["dataset"] and found not in (0, count) and not is_of_nuclei(config):
        raise ValueError(f"{root / 'masks'} has {found} class folder(s), but {folder} predicts {count} class(es)")
    check_layout({**config, "dataset": name})


def chosen_images(options, config, folder):
    """-> (data set, what to call it, the run's split.yml): which images --dataset and --split select.

    The data set holds the run's validation images, all images of another data set, or a split's test ids; it is a
    Dataset, or a NucleiDataset for a run of individual nuclei. The third value is the content of the run's split.yml
    when its validation images were chosen, else {}.
    """
    name = options.dataset or config["dataset"]
    root = INPUTS / name
    if options.dataset:  # its files may end otherwise than those of the training
        endings = {"img_ext": root / "images", "mask_ext": root / "masks" / "0"}
        config = {**config, **{key: usual_ending(place, config[key]) for key, place in endings.items()}}
    check_classes(config, name, folder)
    run_split = read_yaml(folder / "split.yml") if not (options.dataset or options.split) else {}
    if options.split:
        ids, part = check_split(read_yaml(options.split), options.split).get("test"), f"test ids of {options.split}"
        if not ids:
            raise ValueError(f"{options.split} has no `test:` ids; list the ids to evaluate there")
    elif options.dataset:
        ids, part = list_ids(root / "images", config["img_ext"]), "images of the folder"
    else:
        ids, part = check_split(run_split, folder / "split.yml")["val"], "validation images of the run"
    there = list_ids(root / "images", config["img_ext"])
    if missing := sorted(set(ids) - set(there)):
        raise ValueError(f"{root / 'images'} lacks {len(missing)} of {len(ids)} {part}: {listed(missing, 20)}")
    dataset = open_images({**config, "dataset": name}, ids)
    found = dataset.check()
    if run_split and (
        said := changes(run_split, there, {"val": found}, config.get("split") in (None, GROUPED, RANDOM))
    ):
        warn(f"{root} is not what {folder} was trained on: {'; '.join(said)}")
    if name == config["dataset"] and not run_split and (folder / "split.yml").is_file():
        trained = set(read_yaml(folder / "split.yml").get("train", ()))
        if seen := [img_id for img_id in ids if img_id in trained]:
            warn(f"{folder} was trained on {len(seen)} of {len(ids)} {part}: {listed(seen, 3)}")
    return dataset, f"{name}, {part}", run_split


def output_folder(options, name):
    """outputs/<name> for the run's own validation images, a folder inside it for those of --dataset and --split."""
    inner = []
    if options.dataset:
        inner.append("dataset_" + "_".join(Path(options.dataset).parts))
    if options.split:
        inner.append(f"split_{Path(options.split).stem}")
    return OUTPUTS.joinpath(name, *inner)


def write_csv(path, rows):
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


# ---------------------------------------------------------------- masks


def judge(predictor, loader, label=None, on_batch=None):
    """Pixel counts of every image of a loader -> {head: int64 (images, classes, thresholds, 4)}.

    on_batch(img_ids, {head: probabilities}) sees every batch; label: of a progress bar, or None.
    """
    tables = {name: [] for name in predictor.head_names}
    for images, masks, info in tqdm(loader, label, unit="batch", leave=False, disable=None if label else True):
        masks = masks.to(predictor.device, non_blocking=True)
        of_head = predictor.of_heads(images)
        for name, probabilities in of_head.items():
            tables[name].append(count_pixels(probabilities, masks).cpu().numpy())
        if on_batch:
            on_batch(info["img_id"], of_head)
    return {name: np.concatenate(of_batches) for name, of_batches in tables.items()}


def print_results(by_epoch, by_class, about, explain):
    """The tables of heads and classes and, with `explain`, what each column means."""
    for epoch, heads in by_epoch.items():
        print(f"\n{epoch}")
        print_table(heads, {"head": "head", **HEADINGS})
    if len(by_class) > 1:
        print(f"\neach class, {about}")
        print_table(by_class, {"class": "class", **HEADINGS})
    print_definitions(HEADINGS, DEFINITIONS, explain)


def print_definitions(headings, definitions, explain):
    print()
    if explain:
        for key, text in definitions.items():
            print(f"{headings[key]:<12}{text}")
    else:
        print("--explain says how each column is defined")


def compare_levels(predictor, loader, tables, dataset, folder):
    """Measure and print what each level costs and gives, draw levels.png -> the report's section.

    dataset: its name; on the nuclei of the paper the table has the paper's figures, too.
    """
    images = next(iter(loader))[0].to(predictor.device)
    measured = levels.measure(predictor.trained, images, predictor.device, predictor.amp)
    rows, columns = levels.rows_of_levels(measured, tables), {**levels.COST_COLUMNS, **HEADINGS}
    sentence = levels.sufficient(rows)[1]
    about = levels.NOTE.format(batch=len(images), device=device_name(predictor.device))
    if dataset.startswith(levels.PAPER_DATA) and not predictor.trained.encoder:  # the paper has no such network
        columns.update(levels.PAPER_COLUMNS)
        about += f" {levels.PAPER_NOTE}"
    print(f"\nlevels: {about}")
    print_table(levels.with_text(rows), columns)
    print(sentence)
    levels.draw(rows, folder / "levels.png")
    caption = "IoU, time, parameters and memory of each level"
    return levels.section(rows, columns, [sentence, about], folder / "levels.png", caption)


def evaluate_masks(options, config, folder, output):
    """Score, print and write all about a run of masks."""
    level = "mean" if options.levels else options.level
    predictor = Predictor(folder.name, options.device, options.amp, level, tta=options.tta)
    head = "mean" if options.level == "mean" else predictor.model.head_names[-1]
    dataset, what, run_split = chosen_images(options, config, folder)
    loader = make_loader(dataset, options.batch_size, num_workers=options.num_workers)
    print_start(folder, what, dataset, predictor)

    predictions = Predictions(head)
    tables = judge(predictor, loader, folder.name, predictions)
    kept = kept_epoch(config)
    by_epoch = {f"{kept} (model.pth)": rows_of_heads(tables)}
    if kept == "best epoch" and (folder / "last.pth").is_file():
        last = Predictor(folder.name, options.device, options.amp, level, "last", options.tta)
        by_epoch["last epoch (last.pth)"] = rows_of_heads(judge(last, loader, folder.name))
    table = tables[head]
    by_class, rows = rows_of_classes(table), rows_of_images(dataset.img_ids, table)

    scores, (low, high) = summarise(table), bootstrap_interval(table)
    print(f"IoU {scores['iou']:.4f} ({low:.4f} to {high:.4f}, 95 % bootstrap over images), Dice {scores['dice']:.4f}")
    remarks = scores_by_twins(dataset.img_ids, run_split, "IoU", lambda part: summarise(table[part])["iou"])
    for remark in remarks:
        print(remark)
    print_results(by_epoch, by_class, f"{head}, {kept}", options.explain)

    headline = [
        ("IoU", f"{scores['iou']:.4f}", f"pooled, {head}, {kept}; 95 % {low:.4f} to {high:.4f} over images"),
        ("Dice", f"{scores['dice']:.4f}", "pooled"),
        ("mIoU", f"{scores['miou']:.4f}", "foreground and background"),
        ("images", f"{len(dataset)}", what),
    ]
    with replacing(output) as new:
        more = []
        if options.levels:
            more.append(compare_levels(predictor, loader, tables, options.dataset or config["dataset"], new))
        predictions.write(new)
        write_csv(new / "metrics.csv", rows)
        items = gallery_items(dataset, rows, predictions.masks)
        write_examples(items, new / "examples.png")
        page, curves = new / "report.html", folder / "curves.png"
        write_report(page, config, what, headline, remarks, by_epoch, by_class, items, curves, more)
    print(f"masks, metrics.csv and examples.png are in {output}; open {output / 'report.html'}")


# ---------------------------------------------------------------- individual nuclei


def judge_nuclei(predictor, dataset, look_alikes, batch_size, folder=None):
    """Find the nuclei of each picture of a NucleiDataset and compare them with the truth -> [Judged, ...].

    look_alikes: the group of each picture. batch_size: a quarter as many tiles, which have four times the pixels, are
    seen at once. folder: gets the label maps, <id>.png; None: they are not kept.
    """
    judged = []
    label = f"{predictor.name} {predictor.head}"
    for k, img_id in enumerate(tqdm(dataset.img_ids, label, unit="img", leave=False, disable=None)):
        image, true = dataset.arrays(k)
        started = time.perf_counter()
        found = find_nuclei(predictor, image, batch_size=max(1, batch_size // 4))
        seconds = time.perf_counter() - started
        if folder:
            of_nuclei.write_found(folder, img_id, found.labels)
        result = instances.judge(found.labels, true[..., 0].astype(np.int32))
        about = img_id, dataset.facts[k].kind, predictor.head
        judged.append(of_nuclei.Judged(*about, result, str(look_alikes[k]), found.scale, seconds))
    return judged


def compare_levels_of_nuclei(predictors, judged, folder):
    """Print what each level costs and gives, draw levels.png -> the report's section. judged: of all levels."""
    rows = of_nuclei.rows_by(judged, "level")
    for row, predictor in zip(rows, predictors, strict=True):
        row["parameters"] = count_params(predictor.trained)
    sentence = levels.sufficient(rows, "official", "official score")[1]
    about = f"{of_nuclei.LEVELS_NOTE} {device_name(predictors[0].device)}."
    print(f"\nlevels: {about}")
    print_table(levels.with_text(rows), of_nuclei.LEVEL_COLUMNS)
    print(sentence)
    of_nuclei.draw_precision(rows, "level", folder / "levels.png")
    caption = "precision of each level at each threshold of IoU"
    return levels.section(rows, of_nuclei.LEVEL_COLUMNS, [sentence, about], folder / "levels.png", caption)


def evaluate_nuclei(options, config, folder, output):
    """Score, print and write all about a run of individual nuclei."""
    wanted = [level for level in LEVELS if level != "mean"] if options.levels else [options.level or "deepest"]
    predictors = [Predictor(folder.name, options.device, options.amp, level, tta=options.tta) for level in wanted]
    predictor = predictors[-1]
    dataset, what, run_split = chosen_images(options, config, folder)
    print_start(folder, what, dataset, predictor)
    look_alikes = groups(Sketches(dataset.arrays(k)[0] for k in range(len(dataset))))

    with replacing(output) as new:
        about = dataset, look_alikes, options.batch_size
        others = [item for other in predictors[:-1] for item in judge_nuclei(other, *about)]
        judged = judge_nuclei(predictor, *about, new / "labels")
        scores = instances.official_scores([item.result for item in judged])
        remarks = scores_by_twins(dataset.img_ids, run_split, "official score", lambda part: scores[part].mean())
        remarks.append(of_nuclei.about_scale_and_time(judged))
        rows = of_nuclei.rows_by(judged, "kind")
        print(of_nuclei.headline_of(rows[-1]))
        for remark in remarks:
            print(remark)
        print_nuclei(rows, f"{predictor.head}, {kept_epoch(config)}", options.explain)
        more = []
        if options.levels:
            more.append(compare_levels_of_nuclei(predictors, others + judged, new))

        write_csv(new / "metrics.csv", of_nuclei.rows_of_images(judged))
        of_nuclei.draw_precision(rows, "kind", new / "precision.png")
        items = of_nuclei.gallery_items(dataset, judged, new / "labels")
        of_nuclei.write_report(new, config, what, predictor.head, rows, remarks, items, folder / "curves.png", more)
        if options.submission:
            found = ((img_id, of_nuclei.read_found(new / "labels", img_id)) for img_id in dataset.img_ids)
            write_submission(options.submission, found)
    if options.submission:
        print(f"{options.submission}: {rows[-1]['predicted']:,} nuclei of {len(dataset)} images")
    print(f"labels, metrics.csv and precision.png are in {output}; open {output / 'report.html'}")


def print_nuclei(rows, about, explain):
    """The tables by kind of picture and, with `explain`, what each column means."""
    print(f"\nkinds of pictures, {about} (model.pth)")
    print_table(rows, {"kind": "kind", **of_nuclei.COLUMNS})
    print("\nAP at each threshold of IoU")
    print_table(rows, {"kind": "kind", **of_nuclei.PRECISION})
    print_definitions(of_nuclei.HEADINGS, instances.DEFINITIONS, explain)


# ---------------------------------------------------------------- main


def print_start(folder, what, dataset, predictor):
    averaged = ", mean over eight flips and rotations" if predictor.tta else ""
    print(f"{folder}: {what}, {len(dataset)} images, {precision_name(predictor.amp)}{averaged}")


def print_table(rows, columns):
    """columns: {key of a row: heading}; the first is left-aligned, the others right-aligned."""
    lines = [list(columns.values())]
    for row in rows:
        values = [row.get(key, "") for key in columns]
        lines.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def main():
    options, _ = parse_options(build_parser)
    if launched() > 1:
        raise ValueError("val.py evaluates in one process; start it without torchrun: python val.py")
    if options.tta and options.levels:
        raise ValueError("--levels measures single passes; leave --tta out, or judge one level with --level")
    keep_memory()
    name = options.name or newest_run("arch")
    folder, output = run_folder(name), output_folder(options, name)
    config = read_config(folder)
    if options.submission and not is_of_nuclei(config):
        raise ValueError(f"--submission needs a run of train.py --target instances; {folder} predicts masks")
    if options.submission:
        check_submission(options.submission)
    evaluate = evaluate_nuclei if is_of_nuclei(config) else evaluate_masks
    evaluate(options, config, folder, output)
    if options.open:
        open_page(output / "report.html")


if __name__ == "__main__":
    run_script(main)
