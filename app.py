"""A local page to try a run: drop a picture, see each nucleus outlined, and download the results.

pip install -r requirements-app.txt
python app.py                       # opens http://127.0.0.1:7860
python app.py --name mine           # starts with this run of train.py --target instances

The page finds nuclei with any run under models/ that finds them one by one, classifies pictures with the runs of
transfer_resnet18.py, and shows the reports of val.py. It accepts connections from this machine only, needs no network,
and deletes uploads and results when it ends. It rejects what predict.py rejects, with the same messages.
"""

import html
from argparse import ArgumentTypeError

from common.cli import Parser, add_machine_options, answer_early, channel_numbers, number, parse_options, run_script
from common.images import MAX_PIXELS, MOST_PIXELS


def build_parser():
    parser = Parser(description=__doc__)
    a = parser.add_argument
    a("--name", help="the run of individual nuclei to start with; default: the newest")
    a("--port", type=number(int, 1, 65535), default=7860, help="port to serve the page on")
    a("--open", action="store_true", default=True, help="open the page in the browser")
    a("--max_pixels", type=number(int, 1, MOST_PIXELS), default=MAX_PIXELS, help="refuse larger pictures")
    a("--max_megabytes", type=number(int, 1, 10_000), default=500, help="refuse larger files")
    add_machine_options(parser)
    return parser


answer_early(__name__, build_parser)

from common.local_page import load_gradio, page_folder, said_by, serve
from common.runs import MAKERS, list_runs, run_folder
from run_config import is_of_nuclei, levels_of, read_config
from sessions import (
    COLUMNS,
    NO_REPORT,
    SHOWN_ROWS,
    TRIED,
    Question,
    Sessions,
    Stopped,
    about_runs,
    refusal,
    report_of,
    runs_of_nuclei,
)

WAITING = "Drop a picture, or pick an example."
NOTHING = [None] * 5
REFUSED = (ArgumentTypeError, ValueError, OSError, MemoryError, RuntimeError)
WORK = {"trigger_mode": "always_last", "concurrency_limit": 2, "concurrency_id": "work"}  # two pictures at a time
FRAME = '<iframe sandbox="allow-scripts" style="width: 100%; height: 80vh; border: 0" srcdoc="{}"></iframe>'


def choices_of(run):
    """-> the names of a run's levels, the deepest last, and its threshold of the mask."""
    config = read_config(run_folder(run))
    if not is_of_nuclei(config):
        raise ValueError(f"models/{run} finds masks, not individual nuclei; give another --name")
    return [str(level) for level in levels_of(config)], config["mask_threshold"]


def nuclei_tab(gr, visits, block, first):
    """Picture and options on the left; outlines, numbers and files on the right."""
    examples, (levels, mask) = visits.examples(), choices_of(first)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="Your picture (PNG, JPEG, TIFF, BMP, WebP)", height=130, elem_id="file")
            tiles = {"columns": 3, "height": 140, "interactive": False, "allow_preview": False}
            gallery = gr.Gallery(examples, label="Examples", elem_id="examples", **tiles)
            run = gr.Dropdown([first], value=first, label="Run")
            level = gr.Radio(levels, value=levels[-1], label="Level of U-Net++", info="lower: faster", elem_id="level")
            diameter = gr.Number(0, label="Typical diameter in pixels", info="0: found from the picture")
            threshold = gr.Slider(0.05, 0.95, mask, step=0.05, label="Mask threshold", elem_id="mask")
            tta = gr.Checkbox(label="Average over eight flips and rotations", info="eight times slower")
            with gr.Accordion("Microscope files", open=False):
                pixel_size = gr.Number(0, label="Micrometres per pixel", info="0: read from the TIFF")
                channels = gr.Textbox(label="Channels", placeholder="0, or 2,1,0 for red, green and blue")
                number_of_page = gr.Number(0, label="Page of a stack, counted from 0", precision=0)
            stop = gr.Button("Stop", elem_id="stop")
        with gr.Column(scale=2, min_width=300):
            said = gr.Textbox(WAITING, label="Result", elem_id="said", lines=2, max_lines=6)
            overlay = gr.Image(label="Outlines", interactive=False, buttons=["fullscreen"], elem_id="overlay")
            files = gr.File(label="Download", file_count="multiple", interactive=False, elem_id="files")
            with gr.Row():
                sizes = gr.Plot(label="Sizes")
                tried = gr.Dataframe(headers=list(TRIED), label="Levels tried", elem_id="tried")
            table = gr.Dataframe(headers=list(COLUMNS), label=f"The first {SHOWN_ROWS:,} nuclei", max_height=300)

    def find(path, run, level, diameter, threshold, tta, size, channels, page, request: gr.Request, wait=gr.Progress()):
        if not path:
            return WAITING, *NOTHING
        try:
            chosen = channel_numbers(channels) if channels else None
            question = Question(run, level, tta, threshold, diameter, size, chosen, page)
            answer = visits.of(request.session_hash).find(path, question, lambda k: wait((k, None), unit="batches"))
        except Stopped:
            return "Stopped.", *[gr.skip() for _ in NOTHING]
        except REFUSED as error:
            return refusal(path, error), *NOTHING
        return answer.about, answer.overlay, answer.figure, answer.rows, answer.tried, answer.files

    def of_run(run):
        levels, mask = choices_of(run)
        return gr.Radio(levels, value=levels[-1]), mask

    def stop_work(request: gr.Request):
        visits.of(request.session_hash).stop()

    def close(request: gr.Request):
        visits.end(request.session_hash)

    def example(event: gr.SelectData):
        return examples[event.index][0]

    options = [run, level, diameter, threshold, tta, pixel_size, channels, number_of_page]
    work = {"fn": find, "inputs": [file, *options], "outputs": [said, overlay, sizes, table, tried, files], **WORK}
    changes = [file.change, level.input, threshold.release, tta.input]
    changes += [field.submit for field in (diameter, pixel_size, channels, number_of_page)]
    gr.on(changes, show_progress_on=said, **work)
    chosen = run.input(said_by(gr, REFUSED, of_run), run, [level, threshold], queue=False)
    chosen.then(show_progress_on=said, **work)
    gallery.select(example, None, file, queue=False)
    stop.click(stop_work, queue=False)
    block.unload(close)
    block.load(said_by(gr, REFUSED, lambda: gr.Dropdown(list(runs_of_nuclei()))), None, run, queue=False)


def classes_tab(gr, visits, block):
    """A picture -> its class, and where the network looked."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="Your picture", height=130, elem_id="insect")
            run = gr.Dropdown([], label="Run", info=f"made by: {MAKERS['classes']}")
        with gr.Column(scale=2, min_width=300):
            said = gr.Textbox("Drop a picture.", label="Result", elem_id="class")
            label = gr.Label(label="Probabilities")
            heat = gr.Image(label="Where it looked", interactive=False, buttons=["fullscreen"], elem_id="heat")

    def classify(path, run, request: gr.Request):
        if not (path and run):
            return "Drop a picture.", None, None
        try:
            found, picture = visits.of(request.session_hash).classify(path, run)
        except REFUSED as error:
            return refusal(path, error), None, None
        return max(found, key=found.get), found, picture

    def runs():
        names = [name for name, _ in list_runs("classes")]
        return gr.Dropdown(names, value=names[0] if names else None)

    block.load(said_by(gr, REFUSED, runs), None, run, queue=False)
    gr.on([file.change, run.input], classify, [file, run], [said, label, heat], **WORK)


def runs_tab(gr, tab):
    """The runs under models/, and the report that val.py or transfer_resnet18.py wrote of one."""
    table = gr.Dataframe(headers=["run", "finds", "data", "report"], label="Runs under models/", elem_id="runs")
    run = gr.Dropdown([], label="Open the report of", elem_id="report_of")
    frame = gr.HTML()

    def runs():
        rows = about_runs()
        return rows, gr.Dropdown([row[0] for row in rows if row[-1] != NO_REPORT], value=None)

    def show(run):
        return FRAME.format(html.escape(report_of(run).read_text(encoding="utf-8", errors="replace")))

    tab.select(said_by(gr, REFUSED, runs), None, [table, run], queue=False)
    run.input(said_by(gr, REFUSED, show), run, frame, queue=False)


def main():
    options, _ = parse_options(build_parser)
    first = options.name or next(runs_of_nuclei(), None)
    if first is None:
        raise ValueError("models/ has no run of individual nuclei: python train.py --config configs/nuclei.yml")
    choices_of(first)
    with page_folder() as folder:
        gr = load_gradio()
        visits = Sessions(folder, options.device, options.amp, options.max_pixels)
        with gr.Blocks(title="Nuclei one by one", delete_cache=(3600, 86400)) as block:
            gr.Markdown("# Nuclei one by one\nU-Net++ outlines, counts and measures each nucleus, on this machine.")
            with gr.Tab("Nuclei"):
                nuclei_tab(gr, visits, block, first)
            with gr.Tab("Classes"):
                classes_tab(gr, visits, block)
            with gr.Tab("Runs") as tab:
                runs_tab(gr, tab)
        try:
            serve(gr, block, options.port, options.max_megabytes, options.open)
        finally:
            visits.end_all()


if __name__ == "__main__":
    run_script(main)
