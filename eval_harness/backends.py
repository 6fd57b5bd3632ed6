"""lm-eval's models as they are asked here: a prompt that exceeds the model's window stops the run, whatever runs it.

lm-eval cuts such a prompt from the left, examples first, with a warning among many, and scores what is left.
"""

from dataclasses import replace

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs


class WholePrompts:
    """Stands before a model class of lm-eval's: prompts that exceed the window are refused.

    The model's own option to cut them (`truncation=True`; `truncate=True` for an API) lets them be cut. Where the
    window has room for fewer tokens than may be generated, the answer ends with the window. An API that is sent text
    (`tokenized_requests=False`, or a chat) keeps its own window.

    Attributes:
        more_than_choice: places that scoring takes besides those of the prompt and the choice.
    """

    more_than_choice = 1  # vLLM and servers generate one token more

    def generate_until(self, requests, disable_tqdm=False):
        if self._is_checked():
            longest = max(len(self.tok_encode(request.args[0])) for request in requests)
            self._require_window(longest + 1)
            requests = [self._within(request, self.max_length - longest) for request in requests]
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **options):
        if self._is_checked():
            longest = max((len(context) + len(choice) for _, context, choice in requests), default=0)
            self._require_window(longest + self.more_than_choice)
        return super()._loglikelihood_tokens(requests, **options)

    def _is_checked(self) -> bool:
        cuts = getattr(self, "truncation", False) or getattr(self, "_truncate", False)
        return not cuts and getattr(self, "tokenized_requests", True)

    def _require_window(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise ValueError(
                f"a prompt and its answer need {tokens} tokens, the model's window has {self.max_length}: use fewer "
                f"examples or another task, state the window (`--model_args max_length={tokens}`), or, with "
                "`--backend hf`, let prompts be cut from the left (`--model_args truncation=True`)"
            )

    def _within(self, request: Instance, room: int) -> Instance:
        context, options = request.args
        usual = self.max_gen_toks if hasattr(self, "max_gen_toks") else self._max_gen_toks
        if normalize_gen_kwargs(options, usual)["max_gen_toks"] <= room:
            return request
        return replace(request, arguments=(context, {**options, "max_gen_toks": room}))


def load_backend(backend: str, model: str, options: dict, batch_size: int) -> LM:
    """One of lm-eval's models that are not transformers.

    Args:
        backend: lm-eval's name of it, such as "vllm" or "local-completions".
        model: checkpoint folder, hub name, or the name that an API knows.
        options: lm-eval's model arguments.
        batch_size: sequences at a time.

    Raises:
        ValueError: the backend is not installed, or it is an API that gets tokens and whose window is not stated.
    """
    from lm_eval.api.registry import get_model

    key = "pretrained" if backend == "vllm" else "model"
    try:
        kind = get_model(backend)
        whole = type(kind.__name__, (WholePrompts, kind), {})
        lm = whole.create_from_arg_obj({key: model, **options}, {"batch_size": batch_size})
    except ModuleNotFoundError as error:
        extra = "vllm" if backend == "vllm" else "api"
        raise ValueError(f"backend {backend!r} needs `pip install lm-eval[{extra}]` ({error})") from error
    if getattr(lm, "tokenized_requests", False) and "max_length" not in options:
        raise ValueError(
            f"backend {backend!r} does not tell the model's window, and lm-eval would take {lm.max_length + 1}: state "
            "it (`--model_args max_length=N`), or send text (`--model_args tokenized_requests=False`)"
        )
    return lm
