"""Talk to an exported model the way someone without this project would: transformers and remote code only.

Run as a program of its own: `python outsider.py MODEL_FOLDER PROMPT [PROMPT …]`; prints one JSON object a prompt.
"""

import json
import sys

PROJECT_PACKAGES = ("modeling_motif2", "kernels_hub", "trainer", "sft", "eval_harness")


class ProjectBlocker:
    """Import hook that hides this project, so that only the exported folder can provide the model."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PROJECT_PACKAGES:
            raise ModuleNotFoundError(f"{name} is hidden from this process", name=name)


def main(folder: str, prompts: list[str]) -> None:
    """Load `folder` with `trust_remote_code=True` and answer each prompt greedily."""
    sys.meta_path.insert(0, ProjectBlocker())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert not set(sys.modules) & set(PROJECT_PACKAGES), "the project leaked into this process"
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(json.dumps({"class": type(model).__module__, "prompt": prompt, "answer": answer.strip()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
