"""An OpenAI-compatible server for Motif-2: `python -m sft.serve MODEL`, with every option of `transformers serve`.

transformers 5.17 looks a model's class up in transformers itself and so refuses every class from outside; this tells
it where ours is. Needs `pip install "transformers[serving]"`. Nothing else is changed.
"""

import sys

from transformers.cli.serving import model_manager
from transformers.cli.transformers import main as transformers_cli

from modeling_motif2 import Motif2ForCausalLM


def main(argv: list[str] | None = None) -> None:
    """Run `transformers serve` with the given words.

    Args:
        argv: words after `serve`; the process's own by default.
    """
    model_manager.transformers.Motif2ForCausalLM = Motif2ForCausalLM
    sys.argv = ["transformers", "serve", *(sys.argv[1:] if argv is None else argv)]
    transformers_cli()


if __name__ == "__main__":
    main()
