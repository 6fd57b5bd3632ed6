"""Write the card of a finished stage and upload its model: `python -m sft.publish --run_dir runs/sft/stage3 …`.

The card says what the run recorded: settings, data with sources and licences, results before and after.
"""

from dataclasses import dataclass, field

from sft.export import push_stage, write_stage_card
from trainer.cli import parse_recipe


@dataclass
class PublishConfig:
    """Settings of the publication.

    Raises:
        ValueError: no run is named.
    """

    run_dir: str = field(default="", metadata={"help": "folder of a finished stage"})
    push_to_hub: str = field(default="", metadata={"help": "repository (you/name); empty: only write the card"})
    hub_private: bool = field(default=False, metadata={"help": "make that repository private where it is new"})
    license: str = field(default="", metadata={"help": "licence of the weights, as the Hub names it"})
    name: str = field(default="", metadata={"help": "title of the card; empty: the run's name"})

    def __post_init__(self):
        if not self.run_dir:
            raise ValueError("run_dir is empty; give the folder of a finished stage")


def main(argv: list[str] | None = None) -> None:
    """Write the card, upload, and print where both are.

    Raises:
        SystemExit: the folder holds no finished run, or the Hub refused; the message says what to do.
    """
    (config,) = parse_recipe(PublishConfig, description=__doc__, argv=argv)
    try:
        print(write_stage_card(config.run_dir, config.license, config.name or None))
        if config.push_to_hub:
            print(push_stage(config.run_dir, config.push_to_hub, config.hub_private))
    except ValueError as error:
        raise SystemExit(f"sft.publish: {error}") from error


if __name__ == "__main__":
    main()
