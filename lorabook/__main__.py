"""The command line: python -m lorabook demo"""
import argparse
import sys
from pathlib import Path

import lorabook as lb


def demo(output: Path, folder: Path) -> None:
    """Train a LoRA on the bundled creatures and draw the same prompts and seeds at several scales."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"output {str(output)!r} is a folder, or in a folder that is not there; give a file to write")
    world = lb.world("bundled")
    run = lb.train_text_to_image(lb.TextToImageConfig(
        pretrained_model_name_or_path=world.model, train_data_dir=str(lb.bundled(world.data)), output_dir=str(folder),
        rank=world.rank, target=world.target, learning_rate=world.learning_rate, lr_scheduler="cosine",
        lr_warmup_steps=20, train_batch_size=world.train_batch_size, max_train_steps=world.max_train_steps,
        validation_split=world.validation_split, seed=0))
    print(run)
    pipe = lb.load_pipeline(world.model)
    adapter = lb.load_adapter(pipe, run, "creatures")
    print(adapter)
    grid = lb.sweep(pipe, columns={adapter.name: [0, 0.25, 0.5, 0.75, 1]}, rows={"prompt": list(world.prompts)}, seed=1,
                    title="The same prompts and the same noise: the base model (0) and its LoRA at four scales")
    print(f"drew {grid.save(output).absolute()}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def main() -> int:
    """Run the command that the arguments name; returns the exit status."""
    parser = _Parser(prog="lorabook", description=lb.__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    shown = commands.add_parser("demo", allow_abbrev=False, help="train a LoRA on the bundled creatures and draw demo.png",
                                description=demo.__doc__)
    shown.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture to write")
    shown.add_argument("--output_dir", type=Path, default=Path("demo-lora"), help="folder for the adapter")
    arguments = parser.parse_args()
    try:
        demo(arguments.output, arguments.output_dir)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
