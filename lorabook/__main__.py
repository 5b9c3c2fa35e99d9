"""The command line: lorabook demo · doctor · inspect · convert"""

import argparse
import json
import sys
from pathlib import Path

import lorabook as lb


def demo(output: Path, output_dir: Path) -> None:
    """Train a LoRA on the bundled creatures and draw the same prompts at several scales."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(
            f"output {str(output)!r} is a folder, or in a folder that is not there; "
            "give a file to write"
        )
    world = lb.world("bundled")
    run = lb.train_text_to_image(
        lb.TextToImageConfig(
            pretrained_model_name_or_path=world.model,
            train_data_dir=str(lb.bundled(world.data)),
            output_dir=str(output_dir),
            rank=world.rank,
            target=world.target,
            learning_rate=world.learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=20,
            train_batch_size=world.train_batch_size,
            max_train_steps=world.max_train_steps,
            validation_split=world.validation_split,
            seed=0,
        )
    )
    print(run)
    pipe = lb.load_pipeline(world.model)
    adapter = lb.load_adapter(pipe, run, "creatures")
    print(adapter)
    grid = lb.sweep(
        pipe,
        columns={adapter.name: [0, 0.25, 0.5, 0.75, 1]},
        rows={"prompt": list(world.prompts)},
        seed=1,
        title="The same prompts and the same noise: the base model (0) and its LoRA at four scales",
    )
    print(f"drew {grid.save(output).absolute()}")


def doctor(as_json: bool) -> int:
    """Say whether this machine is fit, and what mends it; the exit status is 1 if it is not."""
    report = lb.doctor()
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else report)
    return 0 if report.fit else 1


def inspect(file: str, picture: Path | None) -> None:
    """Say what is in an adapter: form, base model, ranks, ΔW by block, how it was trained."""
    inspection = lb.inspect_adapter(file)
    print(inspection)
    if picture:
        picture.write_bytes(inspection._repr_png_())


def convert(
    source: str, target: Path, format: str, rank: int | None, base: str | None, allow_pickle: bool
) -> None:
    """Write an adapter in another form, with the same ΔW; or at a smaller rank, with its error."""
    if base is None:
        print(lb.save_adapter(source, target, format, rank=rank, allow_pickle=allow_pickle))
        return
    pipe = lb.load_pipeline(base, device="cpu")
    lb.load_adapter(pipe, source, "converted", allow_pickle=allow_pickle)
    print(lb.save_adapter(pipe, target, format, rank=rank))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lorabook", description=lb.__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(function) -> argparse.ArgumentParser:
        help = function.__doc__
        part = commands.add_parser(
            function.__name__, allow_abbrev=False, description=help, help=help
        )
        part.set_defaults(function=function)
        return part

    part = command(demo)
    part.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture to write")
    part.add_argument(
        "--output_dir", type=Path, default=Path("demo-lora"), help="folder for the adapter"
    )
    part = command(doctor)
    part.add_argument("--json", dest="as_json", action="store_true", help="print it as JSON")
    part = command(inspect)
    part.add_argument("file", help="a file, a folder, a bundled name, a Hub id or an address")
    part.add_argument("--picture", type=Path, help="write the picture of it too, as a PNG")
    part = command(convert)
    part.add_argument("source", help="a file, a folder, a bundled name, a Hub id or an address")
    part.add_argument("target", type=Path, help="a folder, or a file where it ends in .safetensors")
    part.add_argument("--format", default="diffusers", choices=("diffusers", "peft", "kohya"))
    part.add_argument("--rank", type=int, help="approximate layers of a larger rank by this one")
    part.add_argument("--base", help="the base model, which some DoRA need to become a LoRA")
    part.add_argument(
        "--allow_pickle", action="store_true", help="read an old .bin, .pt or .ckpt, weights only"
    )
    return parser


def main() -> int:
    """Run the command that the arguments name; returns the exit status."""
    arguments = vars(_parser().parse_args())
    del arguments["command"]
    function = arguments.pop("function")
    try:
        return function(**arguments) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
