"""The numbers of the README, measured again on this machine.

python benchmark.py --only transfer      # seconds an epoch: the plain tutorial loop and transfer_resnet18.py, in turns
"""

import contextlib
import io
import statistics
import time

from cli import Parser, number, parse_options, run_script


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    a = parser.add_argument
    a("--only", choices=sorted(BENCHMARKS), nargs="+", default=sorted(BENCHMARKS), help="which; default all")
    a("--rounds", type=number(int, 1), default=3, help="times each thing is timed, in turns; default 3")
    a("--data_dir", default="inputs/hymenoptera_data", help="transfer: default inputs/hymenoptera_data")
    a("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default auto")
    return parser


def in_turns(steps, rounds):
    """{name: function} -> {name: median seconds}, in turns, because a machine changes; the first call warms up."""
    seconds = {name: [] for name in steps}
    for lap in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                step()
            seconds[name].append(time.perf_counter() - start)
        print(f"round {lap}: " + ", ".join(f"{name} {times[-1]:.1f} s" for name, times in seconds.items()), flush=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


# ---------------------------------------------------------------- transfer


def transfer(options):
    """An epoch, training and validation, of the loop that tutorials show and of transfer_resnet18.py's three ways."""
    kinds = {
        "everything learns": ["--layer_decay", "1"],
        "layer4 and head learn (default)": [],
        "head learns (--freeze)": ["--freeze"],
    }
    plain = "plain loop"
    steps = {plain: plain_epoch(options)} | {name: our_epoch(options, words) for name, words in kinds.items()}
    median = in_turns(steps, options.rounds)
    for name, seconds in median.items():
        print(f"{name:34}{seconds:7.2f} s an epoch {seconds / median[plain]:6.2f} of the {plain}")


def plain_epoch(options):
    """As tutorials have it: ImageFolder decodes every JPEG in every epoch, batches of 4, float32, all layers learn."""
    import torch
    import torchvision
    from torchvision.transforms import v2

    from devices import pick_device
    from folders import MEAN, STD, list_pictures

    device = pick_device(options.device)
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    seen = {
        "train": v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *tensor]),
        "val": v2.Compose([v2.Resize(256), v2.CenterCrop(224), *tensor]),
    }
    _, samples, _ = list_pictures(options.data_dir)

    class Decoded(torch.utils.data.Dataset):
        def __init__(self, part):
            self.samples, self.transform = samples[part], seen[part]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            path, label = self.samples[index]
            return self.transform(torchvision.datasets.folder.pil_loader(path)), label

    workers = {"num_workers": 0 if device.type == "cpu" else 4}
    loaders = {part: torch.utils.data.DataLoader(Decoded(part), 4, shuffle=part == "train", **workers) for part in seen}
    model = torchvision.models.resnet18(num_classes=2).to(device)
    criterion, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def epoch():
        for part, loader in loaders.items():
            model.train(part == "train")
            for images, labels in loader:
                with torch.set_grad_enabled(part == "train"):
                    loss = criterion(model(images.to(device)), labels.to(device))
                if part == "train":
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                loss.item()

    return epoch


def our_epoch(options, words):
    """An epoch of train_model with the options `words`; weights are random, which costs the same as learned ones."""
    import torch

    import transfer_resnet18 as script
    from devices import pick_amp, pick_device

    config = script.new_config(
        *parse_options(script.build_parser, ["--data_dir", options.data_dir, "--device", options.device, *words])
    )
    device = pick_device(config["device"])
    amp = pick_amp(config["amp"], device)
    datasets, classes, _ = script.build_data(config)
    model = script.ResNet18(len(classes), config["freeze_bn"], config["mirror"]).to(device)
    model.to(memory_format=torch.channels_last if amp else torch.contiguous_format)
    loaders = script.build_loaders(config, datasets, model, device, amp)
    optimizer, scheduler = script.build_optimizer(model, config)
    trained = model.fc if config["freeze"] else model
    criterion = torch.nn.CrossEntropyLoss()
    return lambda: script.train_model(trained, loaders, criterion, optimizer, scheduler, 1, device=device, amp=amp)


BENCHMARKS = {"transfer": transfer}


def main():
    options, _ = parse_options(build_parser)
    for name in options.only:
        BENCHMARKS[name](options)


if __name__ == "__main__":
    run_script(main)
